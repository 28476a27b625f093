"""A model without a cache: fresh inputs, a user's texts, and its graph whose rows have an adapter each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gralora_fx.compat.torch_graphs import KeyPath, tree_map_with_path
from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.artifact.companions import loaded_tokenizer
from gralora_fx.exporters.translation.names import AXES
from gralora_fx.exporters.verification.cases import (
    LENGTHS,
    Case,
    TokenResult,
    TokenRun,
    is_text,
    like,
    longest_text,
    pad,
    text_like,
)
from gralora_fx.exporters.verification.output_comparison import OutputComparison
from gralora_fx.runtime.export_directory import ROWS_NAME
from gralora_fx.tracing.inputs.image_sizes import IMAGES, pixels
from gralora_fx.tracing.inputs.input_trees import path_of
from gralora_fx.tracing.traced_model import TracedModel

_BATCH = 16  # a user's texts that are compared at once


def plain_inputs(model: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Texts of several lengths, padded on either side; other and nested inputs in several batch sizes.

    Args:
        model: A traced model.
        generator: Draws the values.
        quick: Whether few are enough; they are few and short either way.

    Yields:
        A description, and inputs by name.
    """
    inputs = model.graph_inputs
    sample = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if len(sample) < len(inputs) or not any(map(is_text, sample)):
        for batch in (1, 3):
            yield (
                f"batch {batch}",
                {name: _nested(model, name, value, batch, generator) for name, value in inputs.items()},
            )
        for image_size in _other_image_sizes(model):
            case = {name: _nested(model, name, value, 2, generator) for name, value in inputs.items()}
            case[IMAGES] = _images(case[IMAGES], image_size, generator)
            yield f"2 images of {pixels(image_size)}", case
        return
    limit = longest_text(model)
    rows, positions_held = _held_sizes(model, sample)
    image_sizes = iter(_other_image_sizes(model))
    for batch, length, padding in ((1, LENGTHS[0], None), (1, LENGTHS[3], None), (3, 11, "right"), (4, 6, "left")):
        batch, size = rows or batch, positions_held or min(length, limit)
        case = {name: text_like(name, value, model, batch, size, generator) for name, value in sample.items()}
        if padding and size > 1:
            pad(case, padding)
        description = f"{batch} x {size}" + (f" padded {padding}" if padding else "")
        for image_size in itertools.islice(image_sizes, 1):
            case[IMAGES] = _images(case[IMAGES], image_size, generator)
            description += f" with images of {pixels(image_size)}"
        yield description, case


def _other_image_sizes(model: TracedModel) -> list[tuple[int, int]]:
    """Image sizes to compare, of a trace in which they vary: smaller and larger than the example's, odd if they may."""
    sizes = model.signature.image_sizes
    if sizes is None or sizes.fixed is not None:
        return []
    height, width = model.example_inputs[IMAGES].shape[2:]
    return [sizes.fitting((height // 2 + 1, width)), sizes.fitting((width + 5, height + 3))]


def _images(images: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random images of another height and width."""
    return torch.randn(*images.shape[:2], *size, generator=generator).to(images.dtype)


def _held_sizes(model: TracedModel, sample: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Batch size and sequence length that a trace is fixed to; None for one that may vary."""
    texts = [name for name in sample if AXES.get(name, ("", ""))[1:2] == ("sequence_length",)]
    sizes = [model.signature.fixed.get(name, (None, None)) for name in texts]
    rows, lengths = zip(*(size[:2] for size in sizes if len(size) > 1), strict=True) if sizes else ((), ())
    return next(filter(None, rows), None), next(filter(None, lengths), None)


def _nested(model: TracedModel, name: str, example: Any, batch: int, generator: torch.Generator) -> Any:
    """Random values with the structure of an example, with another batch size if the trace lets it vary."""

    def fresh(keys: KeyPath, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        rows, *_ = (*model.signature.fixed.get(path_of(name, keys), ()), None)
        return like(value, rows or batch, None, generator)

    return tree_map_with_path(fresh, example)


def text_cases(texts: Sequence[str], tokenizer: Any, traced: TracedModel) -> Iterator[Case]:
    """Batches of 16 texts, each padded to its longest, cut at the model's context.

    Args:
        texts: The texts.
        tokenizer: A tokenizer, or the directory of one.
        traced: The model.

    Yields:
        A description, and inputs by name.

    Raises:
        ExportError: There is no tokenizer, it does not take a text, or it does not give what the model takes.
    """
    loaded = loaded_tokenizer(tokenizer)
    names = [name for name, value in traced.graph_inputs.items() if isinstance(value, Tensor)]
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        where = f"texts {start + 1} to {start + len(batch)}"
        encoded = _encoded(loaded, batch, longest_text(traced), where)
        if "input_ids" in encoded:  # a tokenizer may leave token types out, and they are zeros in a single text
            encoded.setdefault("token_type_ids", torch.zeros_like(encoded["input_ids"]))
        if missing := [name for name in names if name not in encoded]:
            raise ExportError(
                f"the model takes {', '.join(names)}, but the tokenizer gives no {', '.join(missing)} for a text; "
                "leave texts out"
            )
        yield where, {**traced.constants, **{name: encoded[name] for name in names}}


def _encoded(tokenizer: Any, texts: list[str], length: int, where: str) -> dict[str, Tensor]:
    try:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt"))
    except Exception as error:  # tokenizers raise types of their own
        raise ExportError(f"the tokenizer does not take {where} ({first_line(error)})") from error


def compare_rows(run: TokenRun) -> TokenResult:
    """The outputs of `model_rows.onnx`, where there is one, on the inputs that were compared of `model.onnx`.

    Raises:
        ExportError: It cannot run, or its outputs are not made of rows.
    """
    if run.rows is None:
        return TokenResult()
    tensors, passed = OutputComparison(run.rows, run.model, "all").run(run.cases, run.tolerance_check)
    named = (dataclasses.replace(tensor, name=f"{ROWS_NAME}: {tensor.name}") for tensor in tensors)
    return TokenResult(passed, tensors=tuple(named))
