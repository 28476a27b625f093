"""Sizes in forms that have a translation: as those of axes, and as floats where floats are computed with them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from gralora_fx.exporters.fx_passes.matching import aten, expression, is_call, shape
from gralora_fx.graph.pipeline import PassResult

_ARITHMETIC = (aten.div.Tensor, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.pow.Tensor_Scalar)


def plain_sizes(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Replace numbers of elements by products of sizes, and cast sizes that floats are computed with.

    Before: `y = div(x, sym_numel(z))`
    After:  `y = div(x, sym_float(sym_size(z, 0)))`

    Args:
        graph: A graph whose nodes have their traced values; it is changed in place.
    """
    numbers = list(graph.find_nodes(op="call_function", target=aten.sym_numel.default))
    for node in numbers:
        node.replace_all_uses_with(_product(graph, node))
        graph.erase_node(node)
    count = len(numbers)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if is_call(node, *_ARITHMETIC) and value.is_floating_point() and is_size(node.args[1]):
            node.args = (node.args[0], _as_float(graph, node), *node.args[2:])
            count += 1
    return PassResult(count)


def is_size(node: Any) -> bool:
    """Whether a node is a size that is not known when tracing."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.SymInt)


def _as_float(graph: fx.Graph, node: fx.Node) -> fx.Node:
    size = node.args[1]
    assert isinstance(size, fx.Node)
    with graph.inserting_before(node):
        result = graph.call_function(torch.sym_float, (size,))
    result.meta = {**size.meta, "val": torch.sym_float(size.meta["val"])}  # type: ignore[no-untyped-call]
    return result


def _product(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The product of the sizes of a tensor's axes that are not constant one, in place of its number of elements."""
    source = node.args[0]
    sizes = shape(source)
    axes = [axis for axis, size in enumerate(sizes) if expression(size) != 1]
    with graph.inserting_before(node):
        result, value = None, None
        for axis in axes:
            size = graph.call_function(aten.sym_size.int, (source, axis))
            size.meta = {**node.meta, "val": sizes[axis]}
            value = sizes[axis] if value is None else value * sizes[axis]
            if result is None:
                result = size
                continue
            result = graph.call_function(operator.mul, (result, size))
            result.meta = {**node.meta, "val": value}
    assert result is not None  # a number that is not known has an axis that is not
    return result
