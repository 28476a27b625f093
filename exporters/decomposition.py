"""Operators without an ONNX form as the smaller operators that PyTorch makes them of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

Decompositions = Mapping[Any, Callable[..., Any]]


def decompose(graph: fx.Graph, known: Collection[Any], table: Decompositions) -> int:
    """Replace every operator that is not known by what PyTorch computes it with; the rest of the graph stays.

    Before: `y = square(x)`
    After:  `y = pow(x, 2)`

    An operator that is of no others stays too.

    Args:
        graph: A traced graph, every node with the value that tracing noted; it is changed in place.
        known: Operators to leave as they are.
        table: Decompositions of operators that PyTorch does not take apart by itself.

    Returns:
        How many were replaced.
    """
    replaced = 0
    for node in list(graph.nodes):
        is_operator = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        if is_operator and node.target not in known and (node.target in table or _is_composite(node.target)):
            _expand(node, table)
            replaced += 1
    return replaced


def _is_composite(target: Any) -> bool:
    return bool(target._can_decompose())


def _expand(node: fx.Node, table: Decompositions) -> None:
    flat, spec = tree_flatten((node.args, node.kwargs))
    sources = list(dict.fromkeys(leaf for leaf in flat if isinstance(leaf, fx.Node)))
    mode = detect_fake_mode([source.meta["val"] for source in node.graph.nodes if "val" in source.meta])
    assert mode is not None

    def noted(source: fx.Node) -> Any:
        value = source.meta["val"]
        is_real = isinstance(value, Tensor) and not isinstance(value, torch._subclasses.FakeTensor)
        return mode.from_tensor(value) if is_real else value

    def compute(*values: Any) -> Any:
        by_source = dict(zip(sources, values, strict=True))
        args, kwargs = tree_unflatten([by_source.get(leaf, leaf) for leaf in flat], spec)  # type: ignore[call-overload]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with mode, torch.no_grad():
        parts = make_fx(compute, decomposition_table=dict(table))(*map(noted, sources))
    places = dict(zip(parts.graph.find_nodes(op="placeholder"), sources, strict=True))
    with node.graph.inserting_before(node):
        for part in parts.graph.nodes:
            if part.op == "call_function":
                places[part] = node.graph.node_copy(part, places.__getitem__)
                places[part].meta = {**node.meta, "val": part.meta.get("val")}
    (result,) = next(iter(reversed(parts.graph.nodes))).args
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(places[result])
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(places[result[user.args[1]]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
