"""Parts of a graph computed again by PyTorch, into other operators: the values stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from gralora_fx.compat.operators import FakeTensor, detect_fake_mode
from gralora_fx.exporters.pipeline import PassResult

Function = Callable[..., Any]


def _broadcast(x: Tensor, shape: Sequence[Any], axes: Sequence[int]) -> Tensor:
    """`x` with its axes at `axes` of a larger shape."""
    sizes = [x.shape[axes.index(axis)] if axis in axes else 1 for axis in range(len(shape))]
    return x.reshape(sizes).expand(shape)


# what PyTorch's own decompositions are made of, and functionalization does not take
_BASIC: dict[Any, Function] = {torch.ops.prims.broadcast_in_dim.default: _broadcast}


def retrace(
    nodes: Sequence[fx.Node],
    table: Mapping[Any, Function] | None = None,
    written: Sequence[fx.Node] = (),
) -> None:
    """Replace calls in a graph by what tracing their computation once more gives, without writes in place.

    Args:
        nodes: Calls in their order, with no other node between them that they and their readers share a tensor with;
            every input has the value that tracing noted.
        table: Decompositions to apply.
        written: Inputs that the calls write into; who reads them afterwards reads the result.
    """
    inside = set(nodes)
    inputs = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside))
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]

    def compute(*values: Any) -> list[Any]:
        found = dict(zip(inputs, values, strict=True))
        found |= {node: found[node].clone() for node in written}
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
            found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [found[node] for node in (*outputs, *written)]

    mode = detect_fake_mode([node.meta["val"] for node in nodes[0].graph.nodes if "val" in node.meta])
    assert mode is not None
    values = [node.meta["val"] for node in inputs]
    noted = [mode.from_tensor(v) if isinstance(v, Tensor) and not isinstance(v, FakeTensor) else v for v in values]
    with mode, torch.no_grad():
        noted = [v.contiguous() if isinstance(v, Tensor) else v for v in noted]  # ONNX has no other layout
        parts = make_fx(compute, decomposition_table={**_BASIC, **(table or {})})(*noted)
        parts = make_fx(functionalize(parts))(*noted)
    graph, end = nodes[-1].graph, nodes[-1].next
    places: dict[fx.Node, fx.Node] = dict(zip(parts.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(end):
        for part in parts.graph.nodes:
            if part.op == "call_function":
                places[part] = graph.node_copy(part, places.__getitem__)
                places[part].meta = {**nodes[-1].meta, "val": part.meta.get("val")}
    (results,) = next(iter(reversed(parts.graph.nodes))).args
    for node, result in zip(outputs, results, strict=False):
        _let_read(places[result], node, lambda user: user not in inside)
    after = _from(end)
    for node, result in zip(written, results[len(outputs) :], strict=True):
        _let_read(places[result], node, lambda user: user in after)
    for node in reversed(nodes):
        graph.erase_node(node)


def note_values(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Note the value of every call that a pass added without one, by PyTorch's own rules for shapes.

    Args:
        graph: A graph, every other node with the value that tracing noted; its nodes gain notes.
    """
    added = [node for node in graph.nodes if node.op == "call_function" and "val" not in node.meta]
    if not added:
        return PassResult(0)
    mode = detect_fake_mode([node.meta["val"] for node in graph.nodes if "val" in node.meta])
    assert mode is not None

    def value(node: fx.Node) -> Any:
        noted = node.meta["val"]
        return mode.from_tensor(noted) if isinstance(noted, Tensor) and not isinstance(noted, FakeTensor) else noted

    with mode, torch.no_grad():
        for node in added:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            node.meta["val"] = node.target(*args, **kwargs)
    return PassResult(len(added))


def _let_read(new: fx.Node, old: fx.Node, reads: Callable[[fx.Node], bool]) -> None:
    old.replace_all_uses_with(new, delete_user_cb=reads)


def _from(first: fx.Node) -> set[fx.Node]:
    """A node and those after it."""
    nodes = list(first.graph.nodes)
    return set(nodes[nodes.index(first) :])
