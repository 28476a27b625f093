"""Reading of traced expressions: what a node computes, whichever way the model spelled it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.operators.constant_sizes import Slice

aten = torch.ops.aten
MUL = (aten.mul.Tensor, aten.mul.Scalar, operator.mul)
END = 2**63 - 1  # of an axis, whatever its size
ADD = (aten.add.Tensor, aten.add.Scalar, operator.add)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether something is a call of one of some operators."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def operands(node: Any, *targets: Any) -> tuple[Any, Any] | None:
    """The two operands of a call of one of some binary operators, without a factor (`alpha`); None of anything else."""
    if not is_call(node, *targets) or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[0], node.args[1]


def number(value: Any) -> float | None:
    """A number, or None."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def shape(node: Any) -> tuple[Any, ...]:
    """Sizes that tracing noted of a tensor, symbolic ones as they are; of anything else none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def same_size(first: Any, second: Any) -> bool:
    """Whether two sizes are one, without asking the tracer to prove what it has not noted."""
    return bool(expression(first) == expression(second))


def expression(size: Any) -> Any:
    """A size as a plain number or a symbolic expression."""
    if isinstance(size, torch.SymInt):
        found = size.node.maybe_as_int()
        return size.node.expr if found is None else found
    return size


def limits(node: Any) -> Slice | None:
    """A slice with limits known when tracing, its axis counted from the front; None of anything else."""
    if not is_call(node, aten.slice.Tensor) or node.kwargs:
        return None
    given: list[Any] = list(node.args)
    defaults: list[Any] = [None, 0, None, None, 1]
    x, axis, start, stop, step = given + defaults[len(given) :]
    start, stop = 0 if start is None else start, END if stop is None else stop
    rank = len(shape(x))
    if not rank or not all(isinstance(limit, int) for limit in (axis, start, stop, step)):
        return None
    return Slice(x, axis % rank, start, stop, step)


def part(node: Any) -> tuple[fx.Node, int, int, int] | None:
    """`(x, start, stop, step)` where a node is `x[..., start:stop:step]`; None of anything else."""
    found = limits(node)
    if found is None or found.axis != len(shape(found.x)) - 1:
        return None
    size = expression(shape(found.x)[-1])
    if not isinstance(size, int):
        return None
    start, stop, _ = slice(found.start, found.stop).indices(size)
    return found.x, start, stop, found.step


def joined(node: Any) -> list[Any] | None:
    """What a node joins along the last axis; None of anything else."""
    if not is_call(node, aten.cat.default):
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    rank = len(shape(node))
    return list(node.args[0]) if rank and dim % rank == rank - 1 else None
