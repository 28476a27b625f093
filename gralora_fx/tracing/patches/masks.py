"""The mask that a model makes for its layers as one operator of a trace, until it is known what reads it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.compat.transformers_masks import (
    AttentionMaskInterface,
    blockwise_overlay,
    causal_mask_function,
    eager_mask,
    or_masks,
    sliding_window_causal_mask_function,
)
from gralora_fx.graph.surgery import erase_unused
from gralora_fx.operators.namespace import NAMESPACE, define_shape_only, operators_for

CASTS = (
    torch.ops.aten.to.dtype,
    torch.ops.aten.to.device,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten._to_copy.default,
)

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "mask(Tensor padding, SymInt length, int window, ScalarType dtype) -> Tensor"
_library.define(_SCHEMA)
_library.define("mask_of_blocks(Tensor blocks, Tensor plain, Tensor whole) -> Tensor")


def causal_mask(padding: Tensor, length: int, window: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores so that a position sees itself, those before it, and no padding.

    Args:
        padding: `[batch, past + length]`, 0 where a position is padding.
        length: Number of new positions.
        window: How many positions back a position sees, itself included; 0 for all.
        dtype: Dtype of the scores.

    Returns:
        `[batch, 1, length, past + length]`, 0 or the smallest number.
    """
    total = padding.shape[1]
    rows = torch.arange(length, device=padding.device).unsqueeze(1) + (total - length)
    columns = torch.arange(total, device=padding.device).unsqueeze(0)
    seen = columns <= rows
    if window:
        seen = seen & (columns > rows - window)
    seen = seen.unsqueeze(0).unsqueeze(0) & padding.bool().unsqueeze(1).unsqueeze(1)
    return torch.zeros(seen.shape, dtype=dtype, device=padding.device).masked_fill(~seen, torch.finfo(dtype).min)


def mask_shape(padding: Tensor, length: int, window: int, dtype: torch.dtype) -> Tensor:
    """A tensor of the shape of such a mask, without values."""
    return padding.new_empty((padding.shape[0], 1, length, padding.shape[1]), dtype=dtype)


def mask_of_blocks(blocks: Tensor, plain: Tensor, whole: Tensor) -> Tensor:
    """The mask of a text that holds blocks, such as images, whose positions all see each other.

    A trace has both masks until it is known whether there are blocks (see `without_empty_blocks`).

    Args:
        blocks: `[batch, past + length]`, the number of a position's block, -1 for none.
        plain: The mask of a text without blocks, `[batch, 1, length, past + length]`.
        whole: The mask with them, as `plain`.

    Returns:
        `whole`.
    """
    return whole.clone()


_library.impl("mask", causal_mask, "CompositeImplicitAutograd")
_library.impl("mask_of_blocks", mask_of_blocks, "CompositeImplicitAutograd")
define_shape_only(_SCHEMA, mask_shape, torch.ops.gralora.mask.default)


def _mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int,
    kv_length: int,
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor | None:
    """The mask that a model's layers are given, as one operator where it is causal with at most a window."""
    window = local_size or 0
    plain = sliding_window_causal_mask_function(window) if window else causal_mask_function
    given = {"attention_mask": attention_mask, "local_size": local_size, "dtype": dtype, **options}
    made: Tensor | None = None
    if attention_mask is not None and _is_same(mask_function, plain):
        torch._check(attention_mask.shape[1] == kv_length)  # type: ignore[no-untyped-call]
        made = operators_for(attention_mask).mask(attention_mask, q_length, window, dtype)
    else:
        made = eager_mask(q_length=q_length, kv_length=kv_length, mask_function=mask_function, **given)
        blocks = _blocks_beside(mask_function, plain)
        if attention_mask is not None and blocks is not None:
            other = operators_for(attention_mask).mask(attention_mask, q_length, window, dtype)
            made = torch.ops.gralora.mask_of_blocks(blocks, other, made)
    return made


def _blocks_beside(mask_function: Any, plain: Callable[..., Any]) -> Tensor | None:
    """The blocks of a mask that shows what a plain one shows and the positions of one block to each other, or None."""
    blocks: list[Any] = []
    for part in _held(mask_function)[0] if _held(mask_function) else ():
        blocks += [value for value in _held(part) if isinstance(value, Tensor)]
    is_one = len(blocks) == 1 and _is_same(mask_function, or_masks(plain, blockwise_overlay(blocks[0])))
    return blocks[0] if is_one else None


def _held(function: Any) -> tuple[Any, ...]:
    """The values that a function was made over."""
    return tuple(cell.cell_contents for cell in getattr(function, "__closure__", None) or ())


def _is_same(one: Any, other: Any) -> bool:
    """Whether two functions have the same code over the same values, functions among these compared likewise."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if not (inspect.isfunction(one) and inspect.isfunction(other)):
        return type(one) is type(other) and bool(one == other)
    return one.__code__ is other.__code__ and _is_same(_held(one), _held(other))


AttentionMaskInterface.register(NAMESPACE, _mask)


def without_empty_blocks(graph: fx.Graph) -> None:
    """Leave one of both masks: the plain one where no position is in a block.

    Before: `blocks = full(size, -1); m = mask_of_blocks(blocks, mask(padding, ...), whole)`
    After:  `m = mask(padding, ...)`

    Args:
        graph: A fresh trace; it is changed in place.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.gralora.mask_of_blocks.default):
        blocks, plain, whole = node.args
        node.replace_all_uses_with(plain if _holds_only(blocks, -1) else whole)
        erase_unused(graph, node)


def _holds_only(node: Any, number: int) -> bool:
    """Whether every value of a tensor is one number, as its making says."""
    while isinstance(node, fx.Node) and node.target in CASTS:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return False
    if node.target is torch.ops.aten.pad.default:
        return node.args[2:] == ("constant", number) and _holds_only(node.args[0], number)
    return node.target is torch.ops.aten.full.default and node.args[1:] == (number,)
