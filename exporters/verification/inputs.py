"""Fresh inputs for verification: other sizes than the trace's, padded on either side, a single row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from gralora_fx.compat.pytree import KeyPath, tree_map_with_path
from gralora_fx.exporters.translation.names import AXES
from gralora_fx.runtime.context_length import CONTEXT_FIELDS
from gralora_fx.tracing.inputs.decoder_cache import PAST, decoder_cache, empty_cache, pairs_of, positions
from gralora_fx.tracing.inputs.input_trees import path_of, tensor_paths
from gralora_fx.tracing.traced_model import TracedModel

_LENGTHS = (1, 6, 11, 24)
# of a model with a cache: rows, positions before, new positions, side of the padding
_CACHED = (
    (1, 0, 1, ""),
    (1, 0, 24, ""),
    (3, 0, 11, "left"),
    (3, 0, 9, "right"),
    (1, 24, 1, ""),
    (4, 9, 1, "left"),
    (1, 6, 5, ""),
)
_QUICK_CACHED = ((1, 0, 1, ""), (3, 0, 9, "right"), (1, 6, 5, ""))  # left padding and single steps: see `greedy`
# of an encoder-decoder: rows, length of the text, side of its padding, positions before, new positions
_STEPS = (
    (1, 24, "", 0, 1),
    (1, 1, "", 0, 6),
    (3, 11, "right", 0, 4),
    (4, 6, "left", 9, 1),
    (1, 24, "", 24, 1),
    (3, 11, "right", 5, 3),
)
_QUICK_STEPS = ((1, 9, "", 0, 1), (2, 6, "right", 0, 3), (2, 5, "left", 4, 1))


def fresh_cases(model: TracedModel, seed: int, *, quick: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Named inputs to compare on.

    Args:
        model: A traced model with example inputs.
        seed: Seed of the random values.
        quick: Whether a model with a cache gets few and short ones, each kind once: a prompt, one of several rows
            padded, and what follows after others. Models without a cache get the same either way.

    Yields:
        A description, and inputs by name.
    """
    generator = torch.Generator().manual_seed(seed)
    if PAST in model.example_inputs:
        is_pair = isinstance(model.example_inputs[PAST], EncoderDecoderCache)
        cases = (_step_cases if is_pair else _cached_cases)(model, generator, quick)
    else:
        cases = _plain_cases(model, generator)
    for description, case in cases:
        yield description, {**model.constants, **case}


def _plain_cases(model: TracedModel, generator: torch.Generator) -> Iterator[tuple[str, dict[str, Any]]]:
    """Texts of several lengths, padded on either side; of other inputs, and of nested ones, several batches."""
    inputs = model.graph_inputs
    sample = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if len(sample) < len(inputs) or not any(
        AXES.get(name, ())[1:2] in (("sequence_length",), ("decoder_sequence_length",)) for name in sample
    ):
        for batch in (1, 3):
            yield (
                f"batch {batch}",
                {name: _nested(model, name, value, batch, generator) for name, value in inputs.items()},
            )
        return
    limit = _longest(model)
    rows, positions_held = _held_sizes(model, sample)
    for batch, length, padding in ((1, _LENGTHS[0], None), (1, _LENGTHS[3], None), (3, 11, "right"), (4, 6, "left")):
        batch, size = rows or batch, positions_held or min(length, limit)
        case = {name: _text_like(name, value, model, batch, size, generator) for name, value in sample.items()}
        if padding and size > 1:
            _pad(case, padding)
        yield f"{batch} x {size}" + (f" padded {padding}" if padding else ""), case


def _held_sizes(model: TracedModel, sample: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Batch and sequence length that a trace holds for, None for one that may vary."""
    texts = [name for name in sample if AXES.get(name, ("", ""))[1:2] == ("sequence_length",)]
    sizes = [model.signature.fixed.get(name, (None, None)) for name in texts]
    rows, lengths = zip(*(size[:2] for size in sizes if len(size) > 1), strict=True) if sizes else ((), ())
    return next(filter(None, rows), None), next(filter(None, lengths), None)


def attended(outputs: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs without the positions that the mask hides, whose values no one defines.

    Args:
        outputs: Output tensors by name.
        inputs: The inputs they were computed from.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return dict(outputs)
    kept = mask.bool()
    if isinstance(inputs.get(PAST), DynamicCache):  # [batch, heads, total, size]; logits of the last real position
        return {n: v.transpose(1, 2)[kept] if n.startswith("present.") else v[:, -1] for n, v in outputs.items()}
    if PAST in inputs:  # [batch, heads, encoder length, size]
        keys = {n: v.transpose(1, 2)[kept] for n, v in outputs.items() if n.startswith("present.") and ".encoder." in n}
        outputs = {**outputs, **keys}
    if "decoder_input_ids" in inputs:
        aligned = {name for name in outputs if name.startswith("encoder")}
    else:
        aligned = {name for name, value in outputs.items() if value.shape[:2] == mask.shape}
    return {name: value[kept] if name in aligned else value for name, value in outputs.items()}


def flat(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs or outputs by the names of an exported graph: nested ones by their paths, a cache by its layers."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, (DynamicCache, EncoderDecoderCache)):
            found |= _named(value, "present" if "logits" in values else "past_key_values")
        else:
            found |= tensor_paths({name: value})
    return found


def _named(cache: DynamicCache | EncoderDecoderCache, prefix: str) -> dict[str, Tensor]:
    parts = {"": cache}
    if isinstance(cache, EncoderDecoderCache):
        parts = {".decoder": cache.self_attention_cache, ".encoder": cache.cross_attention_cache}
    return {
        f"{prefix}.{index}{part}.{kind}": tensor
        for part, layers in parts.items()
        for index, pair in enumerate(pairs_of(layers))
        for kind, tensor in zip(("key", "value"), pair, strict=True)
    }


def last_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits of the last position of each row that is no padding, `[batch, 1, vocabulary]`.

    Args:
        logits: `[batch, length, vocabulary]`.
        mask: `[batch, past + length]`.
    """
    window = mask[:, mask.shape[1] - logits.shape[1] :]
    last = window.shape[1] - 1 - window.flip(1).argmax(1)
    return logits[torch.arange(logits.shape[0]), last].unsqueeze(1)


def _cached_cases(model: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompts after an empty cache, and steps after a long one, padded on the left."""
    example = model.example_inputs[PAST]
    limit = _longest(model)
    for batch, past, length, side in _QUICK_CACHED if quick else _CACHED:
        if past + length > limit:
            continue
        case = {
            name: _text_like(name, value, model, batch, length, generator)
            for name, value in model.example_inputs.items()
            if isinstance(value, Tensor)
        }
        mask = torch.ones(batch, past + length, dtype=torch.long)
        for row in range(1, batch) if side else ():
            count = min(2 * row, past + length - 1)
            mask[row, slice(count) if side == "left" else slice(-count, None)] = 0
        case["attention_mask"] = mask
        if "position_ids" in case:
            case["position_ids"] = positions(mask, length)
        cache = empty_cache(example, batch)
        if past:  # of the model's own making: on random keys and values its errors would say nothing about texts
            first = {name: value for name, value in case.items() if name not in ("attention_mask", "position_ids")}
            first["input_ids"] = _like(case["input_ids"], batch, past, generator, vocabulary_of(model))
            first["attention_mask"] = mask[:, :past]
            if "position_ids" in case:
                first["position_ids"] = positions(mask[:, :past])
            with torch.no_grad():
                cache = model(**model.constants, **first)[PAST]
        name = f"{batch} x {length}" + (f" after {past}" if past else "") + (f" padded {side}" if side else "")
        yield name, {**case, PAST: cache}


def _step_cases(model: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """A decoder's first steps and steps after others, over texts of several lengths, padded on either side."""
    limit = _longest(model)
    for batch, source, side, past, length in _QUICK_STEPS if quick else _STEPS:
        if past + length > limit or source > limit:
            continue
        example = {name: value for name, value in model.example_inputs.items() if isinstance(value, Tensor)}
        case: dict[str, Any] = {
            name: _text_like(name, value, model, batch, length if name.startswith("decoder_") else source, generator)
            for name, value in example.items()
        }
        _pad(case, side or "right")
        pairs = [[(batch, t.shape[1], past, t.shape[3]) for t in pair] for pair in pairs_of(model.example_inputs[PAST])]
        case[PAST] = decoder_cache([[torch.randn(shape, generator=generator) for shape in pair] for pair in pairs])
        read = f"{batch} x {source}" if "input_ids" in case else f"{batch} inputs"
        padded = f" padded {side}" if side and "attention_mask" in case else ""
        yield f"{length} after {past} of {read}{padded}", case


def context_of(model: TracedModel) -> int | None:
    """How many positions a model has, two less for those that count from two on; None where it says no limit."""
    config = None if model.config is None else model.config.get_text_config()
    limits = [limit for name in CONTEXT_FIELDS if isinstance(limit := getattr(config, name, None), int)]
    return max(1, min(limits) - 2) if limits else None


def vocabulary_of(model: TracedModel) -> int | None:
    """How many tokens a model knows; None where its configuration does not say."""
    config = None if model.config is None else model.config.get_text_config()
    return getattr(config, "vocab_size", None)


def _longest(model: TracedModel) -> int:
    return context_of(model) or max(_LENGTHS)


def _text_like(
    name: str, value: Tensor, model: TracedModel, batch: int, length: int, generator: torch.Generator
) -> Tensor:
    if AXES.get(name, ("", ""))[1:2] not in (("sequence_length",), ("decoder_sequence_length",)):
        return _like(value, batch, None, generator)
    if name.endswith("attention_mask"):
        return torch.ones(batch, length, dtype=value.dtype)
    if name == "position_ids":
        return torch.arange(length, dtype=value.dtype).expand(batch, length).contiguous()
    if name == "token_type_ids":
        return torch.zeros(batch, length, dtype=value.dtype)
    ids = _like(value, batch, length, generator, vocabulary_of(model))
    end = getattr(model.config, "eos_token_id", None)
    if name.endswith("input_ids") and isinstance(end, int) and 0 <= end < (vocabulary_of(model) or 0):
        ids[ids == end] = 1 if end != 1 else 0  # models that pool at the end token need one in every row
        ids[:, -1] = end
    return ids


def _nested(model: TracedModel, name: str, example: Any, batch: int, generator: torch.Generator) -> Any:
    """Random values of the form of an example, with another batch where the trace lets it vary."""

    def like(keys: KeyPath, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        rows, *_ = (*model.signature.fixed.get(path_of(name, keys), ()), None)
        return _like(value, rows or batch, None, generator)

    return tree_map_with_path(like, example)


def _like(
    value: Tensor, batch: int, length: int | None, generator: torch.Generator, vocabulary: int | None = None
) -> Tensor:
    """Random values of the same kind, with another batch and, if given, another length."""
    if value.ndim == 0:
        return value
    shape = [batch, *value.shape[1:]]
    if length is not None and value.ndim > 1:
        shape[1] = length
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value.dtype)
    if value.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    low, high = min(3, (vocabulary or 4) - 1), vocabulary or int(value.max().item()) + 1
    return torch.randint(min(low, max(high - 1, 0)), max(high, 1), shape, generator=generator).to(value.dtype)


def _pad(case: dict[str, Any], side: str) -> None:
    """Hide a different number of positions in every row but the first."""
    for name, mask in case.items():
        if name == "attention_mask":
            for row in range(1, mask.shape[0]):
                hidden = min(row, mask.shape[1] - 1)
                mask[row, slice(0, hidden) if side == "left" else slice(mask.shape[1] - hidden, None)] = 0
