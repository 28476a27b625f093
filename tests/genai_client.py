"""onnxruntime-genai as a reader of export directories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime_genai


def genai_tokens(
    directory: Path,
    prompt: Sequence[int],
    count: int,
    adapter: str | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the greedy tokens after a prompt, up to an end token.

    Args:
        directory: The export.
        prompt: Token ids.
        count: The most tokens.
        adapter: The name of an adapter in the export's own folder, or None.
        inputs: Adapter tensors of an export that takes them as inputs.
    """
    model = onnxruntime_genai.Model(onnxruntime_genai.Config(str(directory)))
    adapters = onnxruntime_genai.Adapters(model)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    for name, value in (inputs or {}).items():
        generator.set_model_input(name, value)
    if adapter is not None:
        adapters.load(str(directory / "adapters" / f"{adapter}.onnx_adapter"), adapter)
        generator.set_active_adapter(adapters, adapter)
    generator.append_tokens(list(prompt))
    fields = json.loads((directory / "genai_config.json").read_text())["model"]
    ends = fields["eos_token_id"] if isinstance(fields["eos_token_id"], list) else [fields["eos_token_id"]]
    tokens: list[int] = []
    while len(tokens) < count:
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        if token in ends:
            break
        tokens.append(token)
    return tokens


def genai_answer(directory: Path, text: str, images: Sequence[Path], count: int) -> tuple[list[int], Mapping[str, Any]]:
    """Return the greedy tokens after a text with images, and what onnxruntime-genai's own processor made of both."""
    model = onnxruntime_genai.Model(str(directory))
    opened = onnxruntime_genai.Images.open(*map(str, images)) if images else None
    inputs = model.create_multimodal_processor()(text, images=opened)
    read = {name: inputs[name].as_numpy() for name in inputs.keys()}  # noqa: SIM118
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=read["input_ids"].shape[1] + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.set_inputs(inputs)
    tokens: list[int] = []
    while len(tokens) < count and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens, read
