"""Retracing of parts of a graph by PyTorch into other operators with the same values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from gralora_fx.compat.torch_graphs import FakeTensor, detect_fake_mode
from gralora_fx.graph.pipeline import PassResult

Function = Callable[..., Any]


def _broadcast(x: Tensor, shape: Sequence[Any], axes: Sequence[int]) -> Tensor:
    """`x` broadcast to a shape, its axes at `axes`."""
    sizes = [x.shape[axes.index(axis)] if axis in axes else 1 for axis in range(len(shape))]
    return x.reshape(sizes).expand(shape)


# used by PyTorch's own decompositions, but not supported by functionalization
_BASIC: dict[Any, Function] = {torch.ops.prims.broadcast_in_dim.default: _broadcast}

# in-place operators whose rule fails while writes are functionalized with dynamic sizes, by what they write
_UNTRACEABLE: dict[Any, Function] = {torch.ops.aten.clamp_.default: torch.ops.aten.clamp.default}


def retrace(
    nodes: Sequence[fx.Node],
    table: Mapping[Any, Function] | None = None,
    written: Sequence[fx.Node] = (),
) -> None:
    """Replace calls in a graph by a new trace of their computation, without in-place writes.

    Args:
        nodes: Calls in their order; no other node between them may share a tensor with them or their readers;
            every input has the value that tracing noted.
        table: Decompositions to apply.
        written: Inputs that the calls write into; later readers read the result instead.
    """
    inside = set(nodes)
    inputs = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside))
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]

    def compute(*values: Any) -> list[Any]:
        computed = dict(zip(inputs, values, strict=True))
        computed |= {node: computed[node].clone() for node in written}
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), computed.__getitem__)
            computed[node] = _call(node.target, args, kwargs)
        return [computed[node] for node in (*outputs, *written)]

    mode = detect_fake_mode([node.meta["val"] for node in nodes[0].graph.nodes if "val" in node.meta])
    assert mode is not None
    values = [node.meta["val"] for node in inputs]
    noted = [_as_fake(value, mode) for value in values]
    with mode, torch.no_grad():
        noted = [v.contiguous() if isinstance(v, Tensor) else v for v in noted]  # ONNX has no other layout
        parts = make_fx(compute, decomposition_table={**_BASIC, **(table or {})})(*noted)
        parts = make_fx(functionalize(parts))(*noted)
    graph, end = nodes[-1].graph, nodes[-1].next
    copies: dict[fx.Node, fx.Node] = dict(zip(parts.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(end):
        for part in parts.graph.nodes:
            if part.op == "call_function":
                copies[part] = graph.node_copy(part, copies.__getitem__)
                copies[part].meta = {**nodes[-1].meta, "val": part.meta.get("val")}
    (results,) = next(iter(reversed(parts.graph.nodes))).args
    for node, result in zip(outputs, results, strict=False):
        _let_read(copies[result], node, lambda user: user not in inside)
    after = _from(end)
    for node, result in zip(written, results[len(outputs) :], strict=True):
        _let_read(copies[result], node, lambda user: user in after)
    for node in reversed(nodes):
        graph.erase_node(node)


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator, which may write into its first argument."""
    functional = _UNTRACEABLE.get(target)
    return target(*args, **kwargs) if functional is None else args[0].copy_(functional(*args, **kwargs))


def note_values(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Set `meta["val"]` of every call that a pass added without one, by PyTorch's own shape rules.

    Args:
        graph: A graph whose other nodes all have their traced values; it is changed in place.
    """
    added = [node for node in graph.nodes if node.op == "call_function" and "val" not in node.meta]
    if not added:
        return PassResult(0)
    mode = detect_fake_mode([node.meta["val"] for node in graph.nodes if "val" in node.meta])
    assert mode is not None

    with mode, torch.no_grad():
        for node in added:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: _as_fake(source.meta["val"], mode))
            node.meta["val"] = node.target(*args, **kwargs)
    return PassResult(len(added))


def _as_fake(value: Any, mode: Any) -> Any:
    """A tensor as a fake one whose sizes are numbers, such as a weight; anything else as it is."""
    is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
    return mode.from_tensor(value, static_shapes=True) if is_real else value


def _let_read(new: fx.Node, old: fx.Node, reads: Callable[[fx.Node], bool]) -> None:
    old.replace_all_uses_with(new, delete_user_cb=reads)


def _from(first: fx.Node) -> set[fx.Node]:
    """A node and all nodes after it."""
    nodes = list(first.graph.nodes)
    return set(nodes[nodes.index(first) :])
