"""The smallest inputs that a traced graph takes, read off the sizes of everything that it computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.compat.pytree import tree_leaves

_LARGE = 8192  # a height and a width for which no size in a model is empty


def least_sizes(graph: fx.Graph, name: str) -> tuple[int, int]:
    """The smallest height and width of an image for which no axis of any value in a graph is empty.

    Args:
        graph: A traced graph, every node with its traced value.
        name: The input `[batch, channels, height, width]`, its height and width dynamic.
    """
    image = next(node for node in graph.find_nodes(op="placeholder") if node.target == name).meta["val"]
    height, width = (_expression(size) for size in image.shape[2:])
    sizes = {expression for node in graph.nodes for expression in _expressions(node.meta.get("val"))}
    hints = {symbol: _LARGE for expression in sizes for symbol in expression.free_symbols}
    return _least(sizes, height, hints), _least(sizes, width, hints)


def _least(sizes: set[Any], axis: Any, hints: dict[Any, int]) -> int:
    """The smallest value of an axis, the others being large, for which all sizes are at least one."""
    bound = [size for size in sizes if axis in size.free_symbols]
    low, high = 1, _LARGE
    while low < high:  # sizes grow with the axis
        middle = (low + high) // 2
        if all(int(size.subs({**hints, axis: middle})) >= 1 for size in bound):
            high = middle
        else:
            low = middle + 1
    return low


def _expressions(value: Any) -> Iterator[Any]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield from (_expression(size) for size in leaf.shape if isinstance(size, torch.SymInt))


def _expression(size: Any) -> Any:
    """A symbolic size as an expression over the symbols of the inputs' axes."""
    return size.node.expr
