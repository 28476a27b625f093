"""Fresh inputs for an encoder-decoder with a cache: first steps and later ones, over texts padded on either side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gralora_fx.exporters.verification.random_values import longest_text, pad, text_like
from gralora_fx.tracing.inputs.decoder_cache import PAST, decoder_cache, pairs_of
from gralora_fx.tracing.traced_model import TracedModel

# rows, length of the text, side of its padding, positions before, new positions
_STEPS = (
    (1, 24, "", 0, 1),
    (1, 1, "", 0, 6),
    (3, 11, "right", 0, 4),
    (4, 6, "left", 9, 1),
    (1, 24, "", 24, 1),
    (3, 11, "right", 5, 3),
)
_QUICK_STEPS = ((1, 9, "", 0, 1), (2, 6, "right", 0, 3), (2, 5, "left", 4, 1))


def encoder_decoder_inputs(
    model: TracedModel, generator: torch.Generator, quick: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A decoder's first and later steps, over texts of several lengths, padded on either side.

    Args:
        model: The traced model.
        generator: Draws the values.
        quick: Whether a few short ones are enough, each kind once.

    Yields:
        A description, and inputs by name.
    """
    limit = longest_text(model)
    for batch, source, side, past, length in _QUICK_STEPS if quick else _STEPS:
        if past + length > limit or source > limit:
            continue
        example = {name: value for name, value in model.example_inputs.items() if isinstance(value, Tensor)}
        case: dict[str, Any] = {
            name: text_like(name, value, model, batch, length if name.startswith("decoder_") else source, generator)
            for name, value in example.items()
        }
        pad(case, side or "right")
        pairs = [[(batch, t.shape[1], past, t.shape[3]) for t in pair] for pair in pairs_of(model.example_inputs[PAST])]
        case[PAST] = decoder_cache([[torch.randn(shape, generator=generator) for shape in pair] for pair in pairs])
        read = f"{batch} x {source}" if "input_ids" in case else f"{batch} inputs"
        padded = f" padded {side}" if side and "attention_mask" in case else ""
        yield f"{length} after {past} of {read}{padded}", case


def drop_padding(outputs: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs without the positions of the encoder that the mask hides, whose values no one defines.

    Args:
        outputs: Output tensors by name; those of the encoder's positions are `[batch, encoder length, size]`, keys and
            values `[batch, heads, encoder length, size]`.
        inputs: The inputs from which they were computed.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return dict(outputs)
    kept = mask.bool()
    found = dict(outputs)
    for name, value in outputs.items():
        if name.startswith("present.") and ".encoder." in name:
            found[name] = value.transpose(1, 2)[kept]
        elif name.startswith("encoder"):
            found[name] = value[kept]
    return found
