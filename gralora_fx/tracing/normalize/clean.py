"""Cleaning of a fresh trace: removal of guards on sizes, inlining of subgraphs."""

from __future__ import annotations

import operator

import torch
from torch import fx

from gralora_fx.compat.torch_graphs import is_mutable
from gralora_fx.graph.surgery import copy_graph, erase_unused
from gralora_fx.tracing.normalize.inline import inline_subgraphs

_ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}


def without_guards(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of an exported graph without size checks, so that batch 1 and length 1 run, and with subgraphs inlined.

    Before: `_guards_fn(x); _assert_tensor_metadata(x, None, None, torch.float32); y = linear(x, w)`
    After:  `y = linear(x, w)`

    Args:
        graph_module: The result of `ExportedProgram.module()`; it is left unchanged.

    Returns:
        A plain `GraphModule` over the same parameters and buffers.
    """
    graph = copy_graph(graph_module)
    inline_subgraphs(graph, graph_module)
    for node in reversed(graph.nodes):
        if (node.op == "call_module" and "_guards_fn" in str(node.target)) or node.target in _ASSERTIONS:
            graph.erase_node(node)
    _drop_empty_parts(graph)
    _drop_dead_scalars(graph)
    _drop_unread_writes(graph)
    result = fx.GraphModule(graph_module, graph, type(graph_module).__name__.removesuffix("Impl"))
    result.graph.lint()
    return result


def _drop_empty_parts(graph: fx.Graph) -> None:
    """Remove concatenations with empty tensors, as from a cache that starts empty.

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
    """Whether a node is a tensor of shape `[0]`, which `cat` ignores."""
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor) and value.ndim == 1 and isinstance(value.shape[0], int) and not value.shape[0]
    )


def _drop_dead_scalars(graph: fx.Graph) -> None:
    """Erase size comparisons that were only used by the guards."""
    for node in reversed(graph.nodes):
        is_size = node.target is torch.ops.aten.sym_size.int or getattr(node.target, "__module__", "") == "_operator"
        if node.op == "call_function" and is_size and not node.users and node.target is not operator.setitem:
            graph.erase_node(node)


def _drop_unread_writes(graph: fx.Graph) -> None:
    """Erase writes into fresh memory that nothing reads, such as initial weights of a layer that a forward makes.

    Before: `w = empty([8, 8]); u = uniform_(w, -1, 1)`, and no more
    After:  nothing
    """
    for root in graph.find_nodes(op="call_function", target=torch.ops.aten.empty.memory_format):
        family = _users(root)
        if all(_only_writes(node) for node in family):
            for node in [*reversed([node for node in graph.nodes if node in family]), root]:
                graph.erase_node(node)


def _users(node: fx.Node) -> set[fx.Node]:
    """What reads a node, and what reads that, as far as they write into its memory."""
    found = set(node.users)
    for user in node.users:
        found |= _users(user) if _only_writes(user) else set()
    return found


def _only_writes(node: fx.Node) -> bool:
    """Whether a node gives its first argument's memory again, or only writes into it."""
    return is_mutable(node.target) or node.target is torch.ops.aten.detach.default
