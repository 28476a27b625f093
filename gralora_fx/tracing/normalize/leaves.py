"""Inlining of leaf modules of a symbolic trace, so that their linear layers become visible."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from gralora_fx.errors import first_line
from gralora_fx.graph.module_tree import LINEAR_TYPES, kept_modes, module_stack
from gralora_fx.graph.out_of_reach import note_opaque
from gralora_fx.graph.pipeline import PassResult, Skip, contract
from gralora_fx.graph.surgery import module_of
from gralora_fx.tracing.normalize.inline import has_hooks, inline_call
from gralora_fx.tracing.normalize.modes import AnnotateModes, set_mode
from gralora_fx.tracing.normalize.regions import INLINED

_INNER = "leaf"


@contract(ends={INLINED})
def inline_leaves(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Replace modules that contain linear layers, in a symbolic trace, by calls on their parameters.

    Before: `y = self.fc(x); z = self.feed_forward(y)`
    After:  `y = linear(x, self.fc.weight, self.fc.bias); ...; z = linear(h, self.feed_forward.2.weight, ...)`

    A module that cannot be traced by itself, or has hooks, stays a call annotated with why (see `out_of_reach`).

    Args:
        graph: A symbolic trace; it is changed in place.
    """
    root, count = module_of(graph), 0
    skipped: list[Skip] = []
    waiting = deque(graph.nodes)
    while waiting:
        node = waiting.popleft()
        if node.op != "call_module":
            continue
        module = root.get_submodule(str(node.target))
        if _is_plain_linear(module):
            _inline_linear(graph, node, module)
            count += 1
        elif holds_linear(module):
            template = (node.args, dict(node.kwargs))
            try:
                inner = _traced(module, template)
            except _Untraced as error:
                note_opaque(node, str(error))
                skipped.append(Skip(str(node.target), str(error)))
            else:
                waiting.extendleft(inline_call(node, inner, _nodes_of(template), str(node.target)))
                count += 1
    return PassResult(count, tuple(skipped))


def holds_linear(module: nn.Module) -> bool:
    """Whether a module is or contains a linear layer."""
    return any(isinstance(part, LINEAR_TYPES) for part in module.modules())


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer: without overrides, hooks or parametrizations."""
    is_linear = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in LINEAR_TYPES)
    return is_linear and not has_hooks(module) and not parametrize.is_parametrized(module)


def _inline_linear(graph: fx.Graph, node: fx.Node, module: nn.Module) -> None:
    x = node.args[0] if node.args else node.kwargs["input" if isinstance(module, nn.Linear) else "x"]
    stack = {**node.meta.get("nn_module_stack", {}), str(node.target): (str(node.target), type(module))}
    with graph.inserting_before(node):
        weight = graph.get_attr(f"{node.target}.weight")
        bias = graph.get_attr(f"{node.target}.bias") if module.bias is not None else None
        if isinstance(module, nn.Linear):
            result = graph.call_function(torch.nn.functional.linear, (x, weight, bias))
        else:
            weight_t = graph.call_function(torch.ops.aten.t.default, (weight,))
            result = graph.call_function(torch.nn.functional.linear, (x, weight_t, bias))
    result.meta = {**node.meta, "nn_module_stack": stack}
    node.replace_all_uses_with(result)
    graph.erase_node(node)


class _Untraced(Exception):
    """A module cannot be traced by itself; the message says why."""


class _Tracer(fx.Tracer):
    """Traces into modules that contain linear layers, and leaves the others as calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_plain_linear(m) or has_hooks(m) or not holds_linear(m)


class _Call(nn.Module):
    """The call of a module with given arguments, in which nodes are placeholders for values."""

    def __init__(self, module: nn.Module, template: Any) -> None:
        super().__init__()
        self.leaf = module  # its name is `_INNER`
        self.template = template
        self.sources = _nodes_of(template)

    def forward(self, values: Any) -> Any:
        value_of = {source: values[index] for index, source in enumerate(self.sources)}
        args, kwargs = fx.map_arg(self.template, value_of.__getitem__)
        return self.leaf(*args, **kwargs)


def _nodes_of(template: Any) -> list[fx.Node]:
    nodes: dict[fx.Node, None] = {}
    fx.map_arg(template, nodes.setdefault)
    return list(nodes)


def _traced(module: nn.Module, template: Any) -> fx.Graph:
    """Trace a module for one call of it, with a placeholder for each node that the call reads.

    Raises:
        _Untraced: It has hooks, cannot be traced, or its two modes differ by more than mode arguments.
    """
    if has_hooks(module):
        raise _Untraced("it has hooks")
    graphs = []
    for training in (True, False):
        with _in_mode(module, training):
            try:
                graphs.append(_Tracer().trace(_Call(module, template)))
            except Exception as error:  # a forward raises what it likes of symbolic values
                raise _Untraced(f"torch.fx cannot trace it ({type(error).__name__}: {first_line(error)})") from error
        AnnotateModes()(graphs[-1])
        set_mode(graphs[-1], module.training)
    first, second = graphs
    if str(first) != str(second):
        raise _Untraced("its forward differs between training and evaluation by more than dropout")
    _settle(first, len(_nodes_of(template)))
    return first


def _settle(graph: fx.Graph, count: int) -> None:
    """Finish a graph of `_Call`: a placeholder for each value, and targets and module paths relative to the module."""
    (values,) = graph.find_nodes(op="placeholder")
    with graph.inserting_before(values):
        placeholders = [graph.placeholder(f"value_{index}") for index in range(count)]
    for item in list(values.users):
        item.replace_all_uses_with(placeholders[item.args[1]])
        graph.erase_node(item)
    graph.erase_node(values)
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            if not str(node.target).startswith(f"{_INNER}."):
                raise _Untraced("it uses a tensor that is neither a parameter nor a buffer of it")
            node.target = str(node.target).removeprefix(f"{_INNER}.")
        stack = {name.removeprefix(_INNER).removeprefix("."): kind for name, kind in module_stack(node)}
        node.meta["nn_module_stack"] = {name: (name, kind) for name, kind in stack.items()}


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode of a module within the block."""
    with kept_modes(module):
        for part in module.modules():
            part.training = training
        yield
