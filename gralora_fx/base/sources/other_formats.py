"""Weights that are not floats in safetensors files: their format, and the command that converts them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONVERTED = "converted"  # the directory that a command writes
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_PICKLE, _ADAPTER = "adapter_model.bin", "adapter_model.safetensors"
_BY_GPTQMODEL = ("gptq", "awq", "gptqmodel")
# of transformers, which unpacks the weights while they are loaded
_UNPACKING = {"compressed-tensors": "CompressedTensorsConfig"}


def gguf_file(directory: Path) -> str | None:
    """Return the GGUF file's name in a directory without safetensors files and pickles; None if there is none."""
    if any((directory / name).is_file() for name in (*_SAFETENSORS, *_PICKLES)):
        return None
    return next((path.name for path in sorted(directory.glob("*.gguf"))), None)


def pickle_file(directory: Path) -> str | None:
    """Return the weight pickle's name in a directory without safetensors files; None if there is none."""
    if any((directory / name).is_file() for name in _SAFETENSORS):
        return None
    return next((name for name in _PICKLES if (directory / name).is_file()), None)


def of_gguf(directory: Path, file: str) -> str:
    """Return the remedy for a GGUF file, for a message."""
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig; "
        f"d, f, out = {_text(directory)}, {_text(file)}, {_text(CONVERTED)}; "
        "AutoModelForCausalLM.from_pretrained(d, gguf_file=f, quantization_config=GgufConfig(dequantize=True))"
        ".save_pretrained(out); AutoTokenizer.from_pretrained(d, gguf_file=f).save_pretrained(out)"
    )
    return (
        f"{directory / file} is a GGUF file, which is not read; give the directory {CONVERTED!r} that this writes (pip "
        f"install gguf accelerate): {_run(code)}"
    )


def of_pickle(directory: Path, file: str, fields: Mapping[str, Any]) -> str:
    """Return the remedy for a model's pickle, for a message."""
    code = (
        f"import transformers; d = {_text(directory)}; "
        f"transformers.{_class(fields)}.from_pretrained(d).save_pretrained(d)"
    )
    return (
        f"{directory} holds its weights as {file}, a pickle, which is not read; this writes them as safetensors beside "
        f"it: {_run(code)}"
    )


def of_adapter_pickle(directory: Path) -> str:
    """Return the remedy for an adapter's pickle, for a message."""
    code = (
        f"import torch; from safetensors.torch import save_file; d = {_text(directory)}; "
        f'tensors = torch.load(d + "/{_ADAPTER_PICKLE}", map_location="cpu", weights_only=True); '
        f'save_file({{k: v.clone() for k, v in tensors.items()}}, d + "/{_ADAPTER}")'
    )
    return (
        f"{directory} holds {_ADAPTER_PICKLE}, a pickle, which can run code when it is read; this writes {_ADAPTER} "
        f"beside it without running any: {_run(code)}"
    )


def of_quantized(origin: object, method: str, fields: Mapping[str, Any]) -> str:
    """Return the remedy for a checkpoint of an unsupported quantization, for a message."""
    begin = f"import transformers; transformers.{_class(fields)}.from_pretrained({_text(origin)}"
    end = f".save_pretrained({_text(CONVERTED)})"
    if method in _BY_GPTQMODEL:
        names = f"{_text(origin)}, {_text(CONVERTED)}"
        code = f"from gptqmodel.utils.model_dequant import dequantize_model; dequantize_model({names})"
        note = "pip install gptqmodel"
    elif method in _UNPACKING:
        code = f"{begin}, quantization_config=transformers.{_UNPACKING[method]}(dequantize=True)){end}"
        note = "copy the tokenizer there"
    elif method == "bitsandbytes":
        code, note = f"{begin}).dequantize(){end}", "copy the tokenizer there"
    else:
        return "give the float checkpoint that it was made from"
    return (
        f"give the float checkpoint that it was made from, or the directory {CONVERTED!r} that this writes ({note}): "
        f"{_run(code)}"
    )


def _class(fields: Mapping[str, Any]) -> str:
    """Return the transformers class that a configuration names."""
    names = fields.get("architectures")
    is_named = isinstance(names, (list, tuple)) and names and str(names[0]).isidentifier()
    return str(names[0]) if is_named and names else "AutoModel"


def _text(value: object) -> str:
    """Quote a text for Python in double quotes, so that the shell's quotes can be single."""
    return json.dumps(str(value))


def _run(code: str) -> str:
    return f"python -c {shlex.quote(code)}"
