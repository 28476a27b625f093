"""Tensors of a model by the names of an exported graph, the positions of them that count, and how they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from gralora_fx.core.tracing.inputs.cache import positions, returned_cache, tensors_of
from gralora_fx.core.tracing.inputs.input_trees import tensor_paths
from gralora_fx.errors import ExportError
from gralora_fx.format.cache_slots import slot_of
from gralora_fx.format.input_names import PRESENT_PREFIX


def flat(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Input or output tensors by the names of an exported graph: nested ones by path, a cache by layer."""
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, Cache):
            tensors |= _named(value, is_present="logits" in values)
        else:
            tensors |= tensor_paths({name: value})
    return tensors


def _named(cache: Cache, *, is_present: bool) -> dict[str, Tensor]:
    tensors = tensors_of(cache)
    if isinstance(cache, EncoderDecoderCache):
        crossed = tensors_of(cache.cross_attention_cache)
        tensors |= {dataclasses.replace(slot, part="encoder"): tensor for slot, tensor in crossed.items()}
    return {slot.present if is_present else slot.past: tensor for slot, tensor in tensors.items()}


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    """The tensors of a model's return value by name, nested ones by their path."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if (cache := returned_cache(outputs)) is not None:
        step = outputs if isinstance(cache, EncoderDecoderCache) else {"logits": outputs["logits"], "cache": cache}
        return flat(step)  # what a decoder's model returns beside them is not exported
    if isinstance(outputs, (list, tuple)):
        outputs = {str(index): value for index, value in enumerate(outputs)}
    if isinstance(outputs, Mapping):
        return tensor_paths({str(name): value for name, value in outputs.items()})
    return {path.removeprefix("output."): tensor for path, tensor in tensor_paths({"output": outputs}).items()}


def last_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits of the last position of each row that is not padding, `[batch, 1, vocabulary]`.

    Args:
        logits: `[batch, length, vocabulary]`.
        mask: `[batch, past + length]`.
    """
    window = mask[:, mask.shape[1] - logits.shape[1] :]
    last = window.shape[1] - 1 - window.flip(1).argmax(1)
    return logits[torch.arange(logits.shape[0]), last].unsqueeze(1)


def without_padding(outputs: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs without the positions that the attention mask hides, whose values no one defines.

    Of keys and values, those of the mask's positions remain; states as they are; of a decoder's logits, the last ones;
    of other outputs, the positions of the text that the mask is of, which the encoder of an encoder-decoder reads.

    Args:
        outputs: Output tensors by name: `[batch, length, ...]`, keys and values `[batch, heads, length, size]`.
        inputs: The inputs from which they were computed.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return dict(outputs)
    has_encoder, has_cache = "decoder_input_ids" in inputs, any(name.startswith(PRESENT_PREFIX) for name in outputs)

    def counted(name: str, value: Tensor) -> Tensor:
        slot = slot_of(name)
        if slot is not None:
            if slot.kind.grows is None:
                return value
            by_position = value.movedim(slot.kind.grows, 1)
            return by_position[mask.bool()] if ".encoder." in name or not has_encoder else value
        if has_cache and not has_encoder:
            return value if value.shape[1] == 1 else last_logits(value, mask)
        is_masked = name.startswith("encoder") if has_encoder else value.shape[:2] == mask.shape
        return value[mask.bool()] if is_masked else value

    return {name: counted(name, value) for name, value in outputs.items()}


def step_inputs(ids: Tensor, mask: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """What a decoder takes of a step: new tokens, the mask of all positions, and the new ones' places.

    Args:
        ids: `[batch, new]`.
        mask: `[batch, all]`, over those that were read before too; 0 where a position is padding.
        names: The inputs that the decoder has.
    """
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask, ids.shape[1])}
    return {name: value for name, value in inputs.items() if name in names}


def largest_gap(expected: Tensor, actual: Tensor) -> float:
    """The largest absolute difference; infinite if only one of two values is finite."""
    both_missing = expected.isnan() & actual.isnan()
    gap = (expected - actual).abs().masked_fill((expected == actual) | both_missing, 0.0)  # inf equals inf
    if not gap.numel():
        return 0.0
    return float(gap.max()) if bool(torch.isfinite(gap).all()) else float("inf")


def largest_value(tensor: Tensor) -> float:
    """The largest finite absolute value; 0 if there is none."""
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def check_finite(name: str, where: str, expected: Tensor, actual: Tensor) -> None:
    """Check that an output is finite wherever the model's is."""
    if bool((expected.isfinite() & ~actual.isfinite()).any()):
        raise ExportError(
            f"the quantized export gives values of {name} that are not finite on {where}, and the model's are finite; "
            "export it without quantize"
        )
