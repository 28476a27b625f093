"""Padding in attention masks: which part of a mask hides padding, and what else the mask does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from gralora_fx.exporters.translation.matching import (
    ADD,
    MUL,
    aten,
    expression,
    is_call,
    number,
    operands,
    reshaped,
    same_size,
    shape,
)

_HIDDEN = -1e4  # an additive mask hides keys with this number or a smaller one
_AND = (aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor)
_NOT = (aten.logical_not.default, aten.bitwise_not.default)
_CAST = (aten._to_copy.default,)
_NONZERO = (aten.ne.Scalar, aten.gt.Scalar)
_EXPAND = (aten.expand.default, aten.expand_as.default)


class MaskParts(NamedTuple):
    """A mask in two parts, both of which hide keys."""

    rest: fx.Node | None  # all that is not padding, boolean or additive; None if there is nothing else
    padding: fx.Node | None  # `[batch, keys]`, zero at padding; None if no padding is hidden


def split_mask(mask: fx.Node) -> MaskParts:
    """Split a mask `[batch or 1, heads or 1, queries or 1, keys]` into padding and the rest.

    Recognised are transformers' own masks, in either form: `allowed & padding[batch, key]`, `where(mask, bias, min)`,
    `bias + mask`, and `(1 - padding[:, None, None, :]) * min`. All else counts as the rest.
    """
    is_boolean = bool(mask.meta["val"].dtype == torch.bool)  # numbers are added to scores, ones and zeros too
    padding = _shown_keys(mask) if is_boolean else _added_padding(mask)
    if padding is not None or _is_true(mask):
        return MaskParts(None, padding)
    return _expanded(mask) or _conjunction(mask) or _selected(mask) or _sum(mask) or MaskParts(mask, None)


def hidden_padding(hidden: fx.Node) -> fx.Node | None:
    """Return the padding of a boolean mask that is true at padding and nowhere else; None for any other mask."""
    return _hidden_keys(hidden) if len(shape(hidden)) == 4 else None


def _expanded(mask: fx.Node) -> MaskParts | None:
    """Split `expand(mask)`: attention operators broadcast by themselves."""
    if not is_call(mask, *_EXPAND) or not isinstance(mask.args[0], fx.Node):
        return None
    parts = split_mask(mask.args[0]) if len(shape(mask.args[0])) == 4 else None
    return None if parts is None or parts.padding is None else parts


def _conjunction(mask: fx.Node) -> MaskParts | None:
    """Split `rest & padding`."""
    both = operands(mask, *_AND)
    parts = [split_mask(part) for part in both or () if isinstance(part, fx.Node) and len(shape(part)) == 4]
    if len(parts) != 2 or all(part.padding is None for part in parts):
        return None
    rests = [part.rest for part in parts if part.rest is not None and not _is_true(part.rest)]
    paddings = [part.padding for part in parts if part.padding is not None]
    return MaskParts(rests[0] if rests else None, paddings[0]) if len(rests) < 2 and len(set(paddings)) == 1 else None


def _selected(mask: fx.Node) -> MaskParts | None:
    """Split `where(padding, bias, smallest)`."""
    selection = selection_of(mask)
    padding = None if selection is None else _shown_keys(selection[0])
    if selection is None or padding is None or not hides(selection[2]) or not isinstance(selection[1], fx.Node):
        return None
    bias = selection[1]
    return MaskParts(bias, padding) if len(shape(bias)) == 4 else None


def _sum(mask: fx.Node) -> MaskParts | None:
    """Split `bias + mask`."""
    terms = operands(mask, *ADD)
    for bias, other in (terms, terms[::-1]) if terms is not None else ():
        if isinstance(bias, fx.Node) and isinstance(other, fx.Node) and len(shape(bias)) == 4:
            padding = _added_padding(other)
            if padding is not None:
                return MaskParts(bias, padding)
    return None


def _shown_keys(node: Any) -> fx.Node | None:
    """Return the padding `[batch, keys]` of a boolean mask that is true at real keys, for every query alike."""
    if len(shape(node)) != 4:
        return None
    if is_call(node, *_EXPAND, *_CAST):
        return _shown_keys(node.args[0])
    if is_call(node, *_NOT):
        return _hidden_keys(node.args[0])
    both = operands(node, *_AND)
    if both is not None:
        for one, other in (both, both[::-1]):
            if _is_true(one):
                return _shown_keys(other)
        return None
    return _row_of_keys(node)


def _hidden_keys(node: Any) -> fx.Node | None:
    """Return the padding `[batch, keys]` of a boolean mask that is true at padding."""
    if is_call(node, *_EXPAND, *_CAST):
        return _hidden_keys(node.args[0])
    if is_call(node, *_NOT):
        return _shown_keys(node.args[0])
    row = node
    while (source := reshaped(row)) is not None:
        row = source
    if is_call(row, aten.eq.Scalar) and row.args[1] == 0:
        sizes = [expression(size) for size in shape(node)]
        keys = shape(row.args[0])
        is_row = len(sizes) == 4 and sizes[1:3] == [1, 1] and len(keys) == 2
        return _row(row.args[0]) if is_row and same_size(keys[1], shape(node)[3]) else None
    hidden = operands(node, aten.rsub.Scalar)
    if hidden is not None and number(hidden[1]) == 1.0:
        return _shown_keys(hidden[0])
    difference = operands(node, aten.sub.Tensor)
    if difference is not None and _is_number(difference[0], 1.0):
        return _shown_keys(difference[1])
    return None


def _row_of_keys(node: fx.Node) -> fx.Node | None:
    """Return the padding `[batch, keys]` that a mask `[batch, 1, 1, keys]` repeats."""
    if is_call(node, aten.index.Tensor):
        rows, indices = node.args
        if not isinstance(indices, (list, tuple)) or len(indices) != 2:
            return None
        along_batch, along_keys = (_is_range(index) for index in indices)
        sizes = [[expression(size) for size in shape(index)] for index in indices]
        fits = sizes[0][1:] == [1, 1, 1] and sizes[1][:3] == [1, 1, 1]
        return _row(rows) if along_batch and along_keys and fits else None
    if [expression(size) for size in shape(node)[1:3]] != [1, 1]:
        return None
    source: Any = node
    while len(shape(source)) > 2:
        before = reshaped(source)
        if before is None and (is_call(source, *_CAST) or (is_call(source, *_NONZERO) and source.args[1] == 0)):
            before = source.args[0]
        if before is None:
            return None
        source = before
    sizes = [shape(node)[0], shape(node)[3]]
    same = len(shape(source)) == 2 and all(same_size(a, b) for a, b in zip(shape(source), sizes, strict=True))
    return _row(source) if same else None


def _row(node: Any) -> fx.Node | None:
    """Return the graph input `[batch, keys]` behind casts and comparisons with zero."""
    while is_call(node, *_CAST, *_NONZERO):
        if len(node.args) > 1 and node.args[1] != 0:
            return None
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == "placeholder" and len(shape(node)) == 2 else None


def _added_padding(node: Any) -> fx.Node | None:
    """Return the padding of an additive mask that is zero at real keys and hides padding."""
    if len(shape(node)) != 4:
        return None
    if is_call(node, *_EXPAND, *_CAST):
        return _added_padding(node.args[0])
    selection = selection_of(node)
    if selection is not None:
        shown, hidden = (_is_number(value, 0.0) for value in selection[1:])
        if shown and hides(selection[2]):
            return _shown_keys(selection[0])
        return _hidden_keys(selection[0]) if hidden and hides(selection[1]) else None
    factors = operands(node, *MUL)
    for one, other in (factors, factors[::-1]) if factors is not None else ():
        if hides(other):
            return _hidden_keys(one)
    return None


def selection_of(node: Any) -> tuple[Any, Any, Any] | None:
    """Return `(condition, value, other)` of a `where`, or of a `masked_fill`, whose condition selects the number."""
    if is_call(node, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
        condition, value, other = node.args
        return condition, value, other
    if is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        value, condition, other = node.args
        return condition, other, value
    return None


def _is_range(node: Any) -> bool:
    """Return whether a node counts from zero along one axis."""
    while is_call(node, aten.unsqueeze.default, *_CAST) or (is_call(node, *ADD) and number(node.args[1]) == 0.0):
        node = node.args[0]
    return is_call(node, aten.arange.default) and len(node.args) == 1


def _is_true(node: Any) -> bool:
    """Return whether a boolean tensor is true everywhere."""
    if is_call(node, *_EXPAND, *_CAST):
        return _is_true(node.args[0])
    both = operands(node, *_AND)
    if both is not None:
        return all(map(_is_true, both))
    if is_call(node, aten.ge.Scalar):
        return _is_range(node.args[0]) and number(node.args[1]) is not None and float(node.args[1]) <= 0.0
    if is_call(node, aten.new_ones.default, aten.ones.default):
        return bool(node.meta["val"].dtype == torch.bool)
    return is_call(node, aten.full.default, aten.full_like.default) and node.args[1] is True


def _is_number(value: Any, wanted: float) -> bool:
    """Return whether a value is a given number everywhere."""
    if is_call(value, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return wanted == 0.0
    if is_call(value, aten.ones_like.default, aten.ones.default):
        return wanted == 1.0
    return _constant(value) == wanted


def hides(value: Any) -> bool:
    """Return whether a value, added to a score, hides the key."""
    constant = _constant(value)
    return constant is not None and constant <= _HIDDEN


def _constant(value: Any) -> float | None:
    """Return a number, or the number that a tensor is filled with."""
    is_filled = is_call(value, aten.full.default, aten.full_like.default, aten.scalar_tensor.default)
    return number(value.args[-1] if is_filled else value)
