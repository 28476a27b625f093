"""Cleaning of a fresh trace: guards on sample sizes go, linear modules become calls on their weights."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

_ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}


def without_guards(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of an exported graph that checks no sizes, so that batch 1 and length 1 run.

    Before: `_guards_fn(x); _assert_tensor_metadata(x, None, None, torch.float32); y = linear(x, w)`
    After:  `y = linear(x, w)`

    Args:
        graph_module: What `ExportedProgram.module()` returned; it is left as it is.

    Returns:
        A plain `GraphModule` over the same parameters and buffers.
    """
    graph = copy_graph(graph_module)
    for node in reversed(graph.nodes):
        if (node.op == "call_module" and "_guards_fn" in str(node.target)) or node.target in _ASSERTIONS:
            graph.erase_node(node)
    _drop_empty_parts(graph)
    _drop_dead_scalars(graph)
    result = fx.GraphModule(graph_module, graph, type(graph_module).__name__.removesuffix("Impl"))
    result.graph.lint()
    return result


def copy_graph(graph_module: fx.GraphModule) -> fx.Graph:
    """A copy of a graph with the node names, metadata and calling convention of the original."""
    copy = fx.Graph(tracer_cls=getattr(graph_module, "_tracer_cls", None))
    val_map: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph_module.graph, val_map)
    original_output = next(iter(reversed(graph_module.graph.nodes)))
    node = copy.output(output, type_expr=original_output.type)
    node.meta = dict(original_output.meta)
    for old, new in val_map.items():
        new.meta = {**old.meta, "custom": dict(old.meta["custom"])} if "custom" in old.meta else dict(old.meta)
    copy._codegen = graph_module.graph._codegen
    return copy


def inline_linear_modules(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a symbolic trace in which plain linear modules are calls on their weight and bias.

    Before: `y = self.fc(x)`
    After:  `y = torch.nn.functional.linear(x, self.fc.weight, self.fc.bias)`

    A layer with hooks, parametrizations or a forward of its own stays a module call.

    Args:
        graph_module: A symbolic trace; it is left as it is.
    """
    graph = copy_graph(graph_module)
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        module = graph_module.get_submodule(str(node.target))
        if _is_plain(module, nn.Linear, nn.Linear.forward) or _is_plain(module, Conv1D, Conv1D.forward):
            _inline(graph, node, module)
    result = fx.GraphModule(graph_module, graph, type(graph_module).__name__.removesuffix("Impl"))
    result.graph.lint()
    return result


def _drop_empty_parts(graph: fx.Graph) -> None:
    """Take what is put behind an empty tensor as it is: a cache that begins empty adds nothing.

    Before: `keys = cat([detach_(lift_fresh_copy(empty)), new_keys], -2)`
    After:  `keys = new_keys`
    """
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.cat.default:
            continue
        parts = [part for part in node.args[0] if not _is_empty(part)]
        if len(parts) == 1:
            empty = [part for part in node.args[0] if part is not parts[0]]
            node.replace_all_uses_with(parts[0])
            graph.erase_node(node)
            for chain in empty:
                erase_unused(graph, chain)


def _is_empty(node: fx.Node) -> bool:
    """Whether a node is a tensor of shape `[0]`, which `cat` passes over."""
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor) and value.ndim == 1 and isinstance(value.shape[0], int) and not value.shape[0]
    )


def erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads, and what then is not read either; inputs stay."""
    erased, waiting = set(), [node]
    while waiting:
        unread = waiting.pop()
        if unread not in erased and not unread.users and unread.op != "placeholder":
            waiting += unread.all_input_nodes
            graph.erase_node(unread)
            erased.add(unread)


def _drop_dead_scalars(graph: fx.Graph) -> None:
    """Erase the size comparisons that only served the guards."""
    for node in reversed(graph.nodes):
        is_size = node.target is torch.ops.aten.sym_size.int or getattr(node.target, "__module__", "") == "_operator"
        if node.op == "call_function" and is_size and not node.users and node.target is not operator.setitem:
            graph.erase_node(node)


def _is_plain(module: nn.Module, kind: type[nn.Module], forward: Any) -> bool:
    has_hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return (
        isinstance(module, kind)
        and type(module).forward is forward
        and not has_hooks
        and not parametrize.is_parametrized(module)
    )


def _inline(graph: fx.Graph, node: fx.Node, module: nn.Module) -> None:
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
