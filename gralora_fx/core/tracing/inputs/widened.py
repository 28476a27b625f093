"""Inputs enlarged for a trace, so that no axis is fixed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from gralora_fx.base.compat.torch_graphs import tree_leaves, tree_map, tree_map_only
from gralora_fx.errors import warn_caller
from gralora_fx.format.input_names import DECODER_INPUTS, TEXT_INPUTS

_MASKS = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}


def widen(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Enlarge inputs to at least two rows, three positions and one padded row, so that no axis is fixed.

    `torch.export` treats an axis of size 1 as constant, and drops a mask that masks nothing.
    """
    sample = {name: value for name, value in inputs.items() if value is not None}
    if isinstance(model, PreTrainedModel):
        accepted = inspect.signature(model.forward).parameters
        for mask, ids in _MASKS.items():
            if mask == "attention_mask" and ids in sample and mask in accepted and mask not in sample:
                sample[mask] = torch.ones_like(sample[ids])
        for group in (TEXT_INPUTS, DECODER_INPUTS):
            sample = _with_positions(sample, group)
    tensors = [leaf for leaf in tree_leaves(sample) if isinstance(leaf, torch.Tensor) and leaf.ndim > 0]
    if tensors and all(leaf.shape[0] == 1 for leaf in tensors):
        sample = tree_map(_with_two_rows, sample)
    for name, value in sample.items():
        if isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] == 1:
            warn_caller(
                f"axis 1 of the example input {name!r} has size 1 and stays fixed; a longer example lets it vary"
            )
    return padded(sample)


def _with_positions(sample: dict[str, Any], group: tuple[str, ...]) -> dict[str, Any]:
    present = [name for name in group if isinstance(sample.get(name), torch.Tensor) and sample[name].ndim >= 2]
    if not present or any(sample[name].shape[1] >= 3 for name in present):
        return sample
    return {name: torch.cat([value] * 4, dim=1) if name in present else value for name, value in sample.items()}


def _with_two_rows(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.ndim > 0 else value


def padded(sample: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a padded row in each mask that masks nothing; changed in place."""
    for mask in _MASKS:
        value = sample.get(mask)
        if isinstance(value, torch.Tensor) and value.ndim == 2 and bool(value.all()) and value.shape[1] > 1:
            value = value.clone()
            value[-1, -1] = 0
            sample[mask] = value
    return sample


def distinct(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without repeated tensors, since `torch.export` makes a tensor passed twice a single input."""
    seen: set[int] = set()

    def unshared(tensor: Tensor) -> Tensor:
        is_first = id(tensor) not in seen
        seen.add(id(tensor))
        return tensor if is_first else tensor.detach().clone().requires_grad_(tensor.requires_grad)

    result: dict[str, Any] = tree_map_only(Tensor, unshared, dict(inputs), is_leaf=lambda part: isinstance(part, Cache))
    return result
