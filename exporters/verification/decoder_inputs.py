"""Fresh inputs for a decoder with a cache: prompts, and steps after others, padded on either side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gralora_fx.exporters.verification.random_values import like, longest_text, text_like, vocabulary_of
from gralora_fx.exporters.verification.tensor_names import last_logits
from gralora_fx.tracing.inputs.decoder_cache import PAST, empty_cache, positions, returned_cache
from gralora_fx.tracing.traced_model import TracedModel

# rows, positions before, new positions, side of the padding
_STEPS = (
    (1, 0, 1, ""),
    (1, 0, 24, ""),
    (3, 0, 11, "left"),
    (3, 0, 9, "right"),
    (1, 24, 1, ""),
    (4, 9, 1, "left"),
    (1, 6, 5, ""),
)
_QUICK_STEPS = ((1, 0, 1, ""), (3, 0, 9, "right"), (1, 6, 5, ""))  # left padding and single steps: see `prompts`


def decoder_inputs(model: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompts with an empty cache, and steps after a long one, padded on the left.

    Args:
        model: The traced model.
        generator: Draws the values.
        quick: Whether a few short ones are enough, each kind once: a prompt, one of several rows padded, and what
            follows after others.

    Yields:
        A description, and inputs by name.
    """
    example = model.example_inputs[PAST]
    limit = longest_text(model)
    for batch, past, length, side in _QUICK_STEPS if quick else _STEPS:
        if past + length > limit:
            continue
        case = {
            name: text_like(name, value, model, batch, length, generator)
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
        if past:  # computed by the model: errors on random keys and values would say nothing about texts
            first = {name: value for name, value in case.items() if name not in ("attention_mask", "position_ids")}
            first["input_ids"] = like(case["input_ids"], batch, past, generator, vocabulary_of(model))
            first["attention_mask"] = mask[:, :past]
            if "position_ids" in case:
                first["position_ids"] = positions(mask[:, :past])
            with torch.no_grad():
                cache = returned_cache(model(**model.constants, **first)) or cache
        name = f"{batch} x {length}" + (f" after {past}" if past else "") + (f" padded {side}" if side else "")
        yield name, {**case, PAST: cache}


def drop_padding(outputs: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs without the positions that the mask hides: of the cache those that count, of the logits the last.

    Args:
        outputs: `logits [batch, length, vocabulary]`, and `present.N.key|value [batch, heads, total, size]`.
        inputs: The inputs from which they were computed.
    """
    mask = inputs.get("attention_mask")
    if mask is None or bool(mask.all()):
        return dict(outputs)
    kept = mask.bool()
    return {
        name: value.transpose(1, 2)[kept] if name.startswith("present.") else _last(value, mask)
        for name, value in outputs.items()
    }


def _last(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits of the last position that counts, `[batch, 1, vocabulary]`."""
    return logits if logits.shape[1] == 1 else last_logits(logits, mask)
