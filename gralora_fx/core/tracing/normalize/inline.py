"""Inlines subgraphs that run exactly once, and leaf modules of a symbolic trace, to expose their layers."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from gralora_fx.base.compat.torch_graphs import tree_info, tree_leaves
from gralora_fx.core.graph.module_tree import LINEAR_TYPES, kept_modes, module_calls
from gralora_fx.core.graph.out_of_reach import note_opaque
from gralora_fx.core.graph.pipeline import PassResult, Skip, contract
from gralora_fx.core.graph.surgery import module_of
from gralora_fx.core.tracing.normalize.modes import INLINED, AnnotateModes, set_mode
from gralora_fx.core.tracing.normalize.regions import LEAVE, enter_autocast, enter_grad_mode
from gralora_fx.errors import first_line

_hop = torch.ops.higher_order
# operator that runs a subgraph once: position of the subgraph, and of its first operand
_WRAPPERS: dict[Any, tuple[int, int]] = {
    _hop.wrap_with_set_grad_enabled: (1, 2),
    _hop.wrap_with_autocast: (4, 5),
    _hop.tag_activation_checkpoint: (0, 1),
    _hop.wrap_activation_checkpoint: (0, 1),
    _hop.invoke_subgraph: (0, 2),
    _hop.wrap: (0, 1),
}
# operators that run it in another mode: the function that enters it, given the arguments before the subgraph
_REGIONS: dict[Any, Any] = {_hop.wrap_with_set_grad_enabled: enter_grad_mode, _hop.wrap_with_autocast: enter_autocast}


@contract(leaves={INLINED})
def inline_subgraphs(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Inline subgraphs that run exactly once into the calling graph, which exposes their linear calls.

    Before: `y = wrap_with_set_grad_enabled(False, self.submod, x, w)[0]`
    After:  `before = enter_grad_mode(False); y = linear(x, w); leave_grad_mode(before)`

    A checkpoint computes the same but saves no memory. Branches and loops (`torch.cond` and the like) stay subgraphs.
    """
    count = 0
    waiting = deque(graph.nodes)
    while waiting:
        node = waiting.popleft()
        if node.op == "call_module":
            path = str(node.target)
            module = module_of(graph).get_submodule(path)
            operands = _operands(module, node)
            if isinstance(module, fx.GraphModule) and operands is not None:
                waiting.extendleft(inline_call(node, module.graph, operands, path))
                count += 1
        elif node.target in _WRAPPERS:
            position, first = _WRAPPERS[node.target]
            path = str(node.args[position].target)
            module = module_of(graph).get_submodule(path)
            if isinstance(module, fx.GraphModule):
                waiting.extendleft(inline_call(node, module.graph, node.args[first:], path))
                count += 1
    return PassResult(count)


def inline_call(node: fx.Node, inner: fx.Graph, operands: Sequence[Any], path: str) -> list[fx.Node]:
    """Replace a call of a subgraph by the subgraph's nodes."""
    graph, copies = node.graph, []
    values: dict[fx.Node, Any] = dict(zip(inner.find_nodes(op="placeholder"), operands, strict=True))
    result: Any = None
    enter = _REGIONS.get(node.target)
    with graph.inserting_before(node):
        if enter is not None:
            context = graph.call_function(enter, tuple(node.args[: _WRAPPERS[node.target][0]]))
        for part in inner.nodes:
            if part.op == "output":
                result = fx.map_arg(part.args[0], values.__getitem__)
            elif part.op != "placeholder":
                values[part] = copied = graph.node_copy(part, values.__getitem__)
                copied.meta = _meta_within(node, part, path)
                if part.op in ("get_attr", "call_module"):
                    copied.target = f"{path}.{part.target}"
                copies.append(copied)
        if enter is not None:
            graph.call_function(LEAVE[enter], (context,))
    _replace_value(node, inner.process_outputs(result))
    return copies[::-1]


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks, which its graph does not show."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _operands(module: nn.Module, node: fx.Node) -> Sequence[Any] | None:
    """Return a call's operands for the placeholders of a nested `GraphModule`; None if they cannot be determined."""
    if not isinstance(module, fx.GraphModule) or has_hooks(module):
        return None
    placeholders = module.graph.find_nodes(op="placeholder")
    info = tree_info(module.graph)
    names = [str(entry.target) for entry in placeholders] if info is None else list(info.orig_args)
    defaults = {str(entry.target): entry.args[0] for entry in placeholders if entry.args}
    arguments = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    if len(node.args) > len(names) or any(name not in arguments for name in names):
        return None
    values = [arguments[name] for name in names]
    values = values if info is None else tree_leaves(values)
    return values if len(values) == len(placeholders) else None


def _meta_within(call: fx.Node, part: fx.Node, path: str) -> dict[str, Any]:
    """Return an inlined node's metadata; module paths of a separately traced subgraph get the call's path as prefix."""
    meta = dict(part.meta)
    if "custom" in meta:
        meta["custom"] = dict(meta["custom"])
    if call.op == "call_module":
        below = {
            f"{path}.{inner}@{call.name}": (f"{path}.{name}", kind) for inner, name, kind in module_calls(part) if name
        }
        meta["nn_module_stack"] = {**call.meta.get("nn_module_stack", {}), **below}
    return meta


def _replace_value(node: fx.Node, value: Any) -> None:
    """Replace a node by its value and erase it; the items of a tuple value replace the nodes that take them."""
    for user in list(node.users):
        if user.target is operator.getitem and not isinstance(value, fx.Node):
            _replace_value(user, value[user.args[1]])
        else:
            user.args, user.kwargs = fx.map_arg(
                (user.args, user.kwargs), lambda source: value if source is node else source
            )
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if source.op == "get_attr" and not source.users:
            source.graph.erase_node(source)


_INNER = "leaf"


@contract(ends={INLINED})
def inline_leaves(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Replace modules that contain linear layers, in a symbolic trace, by calls on their parameters.

    Before: `y = self.fc(x); z = self.feed_forward(y)`
    After:  `y = linear(x, self.fc.weight, self.fc.bias); ...; z = linear(h, self.feed_forward.2.weight, ...)`

    A module that cannot be traced, or has hooks, stays a call, annotated with the reason (see `out_of_reach`).
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
    """Return whether a module is or contains a linear layer."""
    return any(isinstance(part, LINEAR_TYPES) for part in module.modules())


def _is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer without overrides, hooks or parametrizations."""
    is_linear = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in LINEAR_TYPES)
    return is_linear and not has_hooks(module) and not parametrize.is_parametrized(module)


def _inline_linear(graph: fx.Graph, node: fx.Node, module: nn.Module) -> None:
    x = node.args[0] if node.args else node.kwargs["input" if isinstance(module, nn.Linear) else "x"]
    stack = {**node.meta.get("nn_module_stack", {}), f"{node.target}@{node.name}": (str(node.target), type(module))}
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
    """Raised if a module cannot be traced by itself; the message says why."""


class _Tracer(fx.Tracer):
    """Traces into modules that contain linear layers, and leaves the others as calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_plain_linear(m) or has_hooks(m) or not holds_linear(m)


class _Call(nn.Module):
    """A module call with given arguments, whose nodes become placeholders."""

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
    """Trace a module for one of its calls, with a placeholder for each node that the call reads."""
    if has_hooks(module):
        raise _Untraced("it has hooks")
    graphs = []
    for training in (True, False):
        with _in_mode(module, training):
            try:
                graphs.append(_Tracer().trace(_Call(module, template)))
            except Exception as error:  # a forward may raise anything on symbolic values
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
        node.meta["nn_module_stack"] = {
            call: (name.removeprefix(_INNER).removeprefix("."), kind) for call, name, kind in module_calls(node)
        }


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode of a module within the block."""
    with kept_modes(module):
        for part in module.modules():
            part.training = training
        yield
