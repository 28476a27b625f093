"""Matching of traced expressions by what they compute, however the model's code is written."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.core.operators.layers import Reshape, Slice

aten = torch.ops.aten
MUL = (aten.mul.Tensor, aten.mul.Scalar, operator.mul)
END = 2**63 - 1  # end of a slice over an axis of any size
ADD = (aten.add.Tensor, aten.add.Scalar, operator.add)


def is_call(node: Any, *targets: Any) -> bool:
    """Return whether a value is a call of one of the given operators."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def operands(node: Any, *targets: Any) -> tuple[Any, Any] | None:
    """Return the operands of a binary operator's call without `alpha`; None for anything else."""
    if not is_call(node, *targets) or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[0], node.args[1]


def number(value: Any) -> float | None:
    """Return a number as float, or None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def reshaped(node: Any) -> Any:
    """Return the input of a reshape; None for other nodes."""
    reshape = Reshape.of(node)
    if reshape is not None:
        return reshape.x
    views = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default)
    return node.args[0] if is_call(node, *views) else None


def shape(node: Any) -> tuple[Any, ...]:
    """Return a tensor's traced shape, including symbolic sizes; empty for anything else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def same_size(first: Any, second: Any) -> bool:
    """Return whether two sizes are equal expressions, without adding a guard to the trace."""
    return bool(expression(first) == expression(second))


def is_size(node: Any) -> bool:
    """Return whether a node is a size unknown at trace time."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.SymInt)


def expression(size: Any) -> Any:
    """Return a size as a plain number or a symbolic expression."""
    if isinstance(size, torch.SymInt):
        number = size.node.maybe_as_int()
        return size.node.expr if number is None else number
    return size


def limits(node: Any) -> Slice | None:
    """Return a slice with limits known at trace time, its axis counted from the front; None for anything else."""
    if not is_call(node, aten.slice.Tensor) or node.kwargs:
        return None
    args: list[Any] = list(node.args)
    defaults: list[Any] = [None, 0, None, None, 1]
    x, axis, start, stop, step = args + defaults[len(args) :]
    start, stop = 0 if start is None else start, END if stop is None else stop
    rank = len(shape(x))
    if not rank or not all(isinstance(limit, int) for limit in (axis, start, stop, step)):
        return None
    return Slice(x, axis % rank, start, stop, step)


def last_axis_slice(node: Any) -> tuple[fx.Node, int, int, int] | None:
    """Return `(x, start, stop, step)` of a node `x[..., start:stop:step]`; None for anything else."""
    sliced = limits(node)
    if sliced is None or sliced.axis != len(shape(sliced.x)) - 1:
        return None
    size = expression(shape(sliced.x)[-1])
    if not isinstance(size, int):
        return None
    start, stop, _ = slice(sliced.start, sliced.stop).indices(size)
    return sliced.x, start, stop, sliced.step


def concat_operands(node: Any) -> list[Any] | None:
    """Return the operands of a concatenation along the last axis; None for anything else."""
    if not is_call(node, aten.cat.default):
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    rank = len(shape(node))
    return list(node.args[0]) if rank and dim % rank == rank - 1 else None
