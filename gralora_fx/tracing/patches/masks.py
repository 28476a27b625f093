"""The attention mask as one operator of a trace, until it is known what reads it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gralora_fx.compat.transformers_models import (
    blockwise_overlay,
    causal_mask_function,
    eager_mask,
    or_masks,
    sliding_window_causal_mask_function,
)
from gralora_fx.operators.attention import Mask, MaskOfBlocks


def make_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int,
    kv_length: int,
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor | None:
    """The mask behind transformers' mask interface, as one operator if it is causal with at most a window."""
    window = local_size or 0
    plain = sliding_window_causal_mask_function(window) if window else causal_mask_function
    given = {"attention_mask": attention_mask, "local_size": local_size, "dtype": dtype, **options}
    made: Tensor | None = None
    if attention_mask is not None and _is_same(mask_function, plain):
        torch._check(attention_mask.shape[1] == kv_length)  # type: ignore[no-untyped-call]
        made = Mask.compute(padding=attention_mask, length=q_length, window=window, dtype=dtype)
    else:
        made = eager_mask(q_length=q_length, kv_length=kv_length, mask_function=mask_function, **given)
        blocks = _blocks_beside(mask_function, plain)
        if attention_mask is not None and blocks is not None:
            other = Mask.compute(padding=attention_mask, length=q_length, window=window, dtype=dtype)
            made = MaskOfBlocks.compute(blocks=blocks, plain=other, whole=made)
    return made


def _blocks_beside(mask_function: Any, plain: Callable[..., Any]) -> Tensor | None:
    """The blocks of a mask that is a plain one or'ed with attention within blocks; None for any other."""
    blocks: list[Any] = []
    for part in _closure_values(mask_function)[0] if _closure_values(mask_function) else ():
        blocks += [value for value in _closure_values(part) if isinstance(value, Tensor)]
    is_one = len(blocks) == 1 and _is_same(mask_function, or_masks(plain, blockwise_overlay(blocks[0])))
    return blocks[0] if is_one else None


def _closure_values(function: Any) -> tuple[Any, ...]:
    """The values in a function's closure."""
    return tuple(cell.cell_contents for cell in getattr(function, "__closure__", None) or ())


def _is_same(one: Any, other: Any) -> bool:
    """Whether two functions have the same code and closure values, compared recursively."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if not (inspect.isfunction(one) and inspect.isfunction(other)):
        return type(one) is type(other) and bool(one == other)
    return one.__code__ is other.__code__ and _is_same(_closure_values(one), _closure_values(other))
