"""What an export is compared on: fresh inputs of each kind of model, and prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gralora_fx.base.compat.torch_graphs import KeyPath, tree_map_with_path
from gralora_fx.base.features import parts
from gralora_fx.core.tracing.inputs.cache import empty_cache, positions, returned_cache
from gralora_fx.core.tracing.inputs.input_trees import path_of
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.translation.names import AXES
from gralora_fx.exporters.verify.cases import (
    LENGTHS,
    Case,
    PromptBatch,
    context_of,
    is_text,
    like,
    longest_text,
    pad,
    text_like,
    vocabulary_of,
)
from gralora_fx.format.input_names import PAST, beside_ids

if TYPE_CHECKING:  # of a model whose inputs features know alone
    from gralora_fx.format.input_names import OtherValues

_STEPS = (  # rows, positions before, new positions, side of the padding
    (1, 0, 1, ""),
    (1, 0, 24, ""),
    (3, 0, 11, "left"),
    (3, 0, 9, "right"),
    (1, 24, 1, ""),
    (4, 9, 1, "left"),
    (1, 6, 5, ""),
)
_QUICK_STEPS = ((1, 0, 1, ""), (3, 0, 9, "right"), (1, 6, 5, ""))  # left padding and single steps: see `_QUICK_PROMPTS`
_ANSWER = 24  # tokens of an encoder-decoder's answer that is measured
_LONG = 1000  # positions of the longest prompt, if the model has as many
# lengths of the prompts of one batch, padding side, and number of tokens to compare
_PROMPTS: tuple[tuple[tuple[int, ...], str, int], ...] = (
    ((12,), "left", 16),
    ((17, 3, 11, 6), "left", 16),
    ((9, 5, 7), "right", 4),
    ((_LONG,), "left", 4),
)
_QUICK_PROMPTS: tuple[tuple[tuple[int, ...], str, int], ...] = (((7, 3), "left", 4),)


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


def decoder_inputs(model: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompts with an empty cache, and steps after a long one, padded on the left."""
    example, beside = model.example_inputs[PAST], beside_ids(model.example_inputs)
    limit = longest_text(model)
    for batch, past, length, side in _QUICK_STEPS if quick else _STEPS:
        if past + length > limit:
            continue
        case = {
            name: text_like(name, value, model, batch, length, generator)
            for name, value in model.example_inputs.items()
            if isinstance(value, Tensor) and name not in beside
        }
        mask = torch.ones(batch, past + length, dtype=torch.long)
        for row in range(1, batch) if side else ():
            count = min(2 * row, past + length - 1)
            mask[row, slice(count) if side == "left" else slice(-count, None)] = 0
        case["attention_mask"] = mask
        if "position_ids" in case:
            case["position_ids"] = positions(mask, length)
        cache = empty_cache(example, batch)
        if past:  # computed by the model: errors on random keys and values would say nothing about texts
            first = {name: value for name, value in case.items() if name not in ("attention_mask", "position_ids")}
            first["input_ids"] = like(case["input_ids"], batch, past, generator, vocabulary_of(model))
            first["attention_mask"] = mask[:, :past]
            if "position_ids" in case:
                first["position_ids"] = positions(mask[:, :past])
            with torch.no_grad():
                cache = returned_cache(model(**model.constants, **first)) or cache
        name = f"{batch} x {length}" + (f" after {past}" if past else "") + (f" padded {side}" if side else "")
        for examples in parts("step examples", beside):
            case |= examples.drawn_beside(model, case, generator)
        yield name, {**case, PAST: cache}


def random_prompts(model: TracedModel, seed: int, quick: bool = False) -> Iterator[PromptBatch]:
    """Random prompts: one, several of unequal length padded on either side, and one that fills the context."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, context = vocabulary_of(model) or 4, context_of(model) or _LONG
    for lengths, side, steps in _QUICK_PROMPTS if quick else _PROMPTS:
        room = min(context, _LONG) - steps
        if room < 1:
            continue
        sizes = [min(length, room) for length in lengths]
        rows = [torch.randint(min(3, vocabulary - 1), vocabulary, (size,), generator=generator) for size in sizes]
        yield pad_prompts([row.tolist() for row in rows], side=side, steps=steps)


def pad_prompts(
    rows: Sequence[Sequence[int]], *, side: str = "left", steps: int = 16, label: str = "prompt"
) -> PromptBatch:
    """Batch prompts, the shorter ones padded."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        filled = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[index, filled], mask[index, filled] = torch.tensor(row), 1
    sizes = sorted({len(row) for row in rows})
    size = f"{sizes[0]} to {sizes[-1]} tokens padded {side}" if len(sizes) > 1 else f"{longest} tokens"
    return PromptBatch(f"{len(rows)} {label}{'s' * (len(rows) > 1)} of {size}", ids, mask, steps)


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
