"""Inputs to compare models without a cache on, and to measure encoder-decoders on: texts, other and nested inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gralora_fx.base.compat.torch_graphs import KeyPath, tree_map_with_path
from gralora_fx.core.tracing.inputs.cache import empty_cache
from gralora_fx.core.tracing.inputs.input_trees import path_of
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.translation.names import AXES
from gralora_fx.exporters.verify.cases import LENGTHS, Case, is_text, like, longest_text, pad, text_like
from gralora_fx.format.input_names import PAST

if TYPE_CHECKING:
    from gralora_fx.format.input_names import OtherValues

_ANSWER = 24  # tokens of an encoder-decoder's answer that is measured


def plain_inputs(model: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Texts of several lengths, padded on either side; other and nested inputs in several batch sizes."""
    inputs = model.graph_inputs
    sample = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if len(sample) < len(inputs) or not any(map(is_text, sample)):
        for batch in (1, 3):
            yield (
                f"batch {batch}",
                {name: _nested(model, name, value, batch, generator) for name, value in inputs.items()},
            )
        for changed, words, other in _others(model):
            case = {name: _nested(model, name, value, 2, generator) for name, value in inputs.items()}
            case[changed] = other(case[changed], generator)
            yield f"2 {words}", case
        return
    limit = longest_text(model)
    rows, positions_held = _held_sizes(model, sample)
    others = _others(model)
    for batch, length, padding in ((1, LENGTHS[0], None), (1, LENGTHS[3], None), (3, 11, "right"), (4, 6, "left")):
        batch, size = rows or batch, positions_held or min(length, limit)
        case = {name: text_like(name, value, model, batch, size, generator) for name, value in sample.items()}
        if padding and size > 1:
            pad(case, padding)
        description = f"{batch} x {size}" + (f" padded {padding}" if padding else "")
        for changed, words, other in itertools.islice(others, 1):
            case[changed] = other(case[changed], generator)
            description += f" with {words}"
        yield description, case


def _others(model: TracedModel) -> Iterator[tuple[str, str, OtherValues]]:
    """Yield other values of inputs that features know, to compare: the input, the value in words, what makes it."""
    for facts in model.signature.facts.values():
        yield from ((facts.input, *other) for other in facts.others(model.example_inputs[facts.input]))


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


def random_answers(model: TracedModel, seed: int) -> list[Case]:
    """What an encoder-decoder is measured on: 16 random texts, or 4 other inputs, each with an answer from its start.

    None is padded, and there are no keys and values but those that the model computes.
    """
    generator, length = torch.Generator().manual_seed(seed), min(_ANSWER, longest_text(model))
    example = {name: value for name, value in model.example_inputs.items() if isinstance(value, Tensor)}
    cases: list[Case] = []
    for number in range(1, 5 if any(is_text(name) and not name.startswith("decoder_") for name in example) else 2):
        case = {name: text_like(name, value, model, 4, length, generator) for name, value in example.items()}
        start = getattr(model.config, "decoder_start_token_id", None)
        if isinstance(start, int):
            case["decoder_input_ids"][:, 0] = start
        empty = empty_cache(model.example_inputs[PAST], 4)
        cases.append((f"4 random inputs, part {number}", {**model.constants, **case, PAST: empty}))
    return cases
