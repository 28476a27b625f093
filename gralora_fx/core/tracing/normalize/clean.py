"""The normalizing stage of a trace: the passes over a fresh graph, in order, and those that clean it."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import fx

from gralora_fx.base.compat.torch_graphs import is_mutable
from gralora_fx.core.graph.pipeline import Pass, PassLog, PassResult, Pipeline, contract
from gralora_fx.core.graph.surgery import copy_graph, erase_unused
from gralora_fx.core.operators import COMPUTING, STANDS_FOR
from gralora_fx.core.tracing.draft import Captured
from gralora_fx.core.tracing.inputs.input_trees import CacheLayout, cache_layout
from gralora_fx.core.tracing.normalize.modes import (
    INLINED,
    UNGUARDED,
    AnnotateModes,
    evaluate,
    find_rng_op,
    updated_buffers,
)
from gralora_fx.core.tracing.normalize.products import plain_products
from gralora_fx.errors import TraceError

_ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}


@contract(needs={INLINED}, leaves={UNGUARDED})
def drop_guards(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Remove size checks, so that batch 1 and length 1 run.

    Before: `_guards_fn(x); _assert_tensor_metadata(x, None, None, torch.float32); y = linear(x, w)`
    After:  `y = linear(x, w)`
    """
    guards = [
        node
        for node in reversed(graph.nodes)
        if (node.op == "call_module" and "_guards_fn" in str(node.target)) or node.target in _ASSERTIONS
    ]
    for node in guards:
        graph.erase_node(node)
    return PassResult(len(guards))


def drop_empty_parts(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Remove concatenations with empty tensors, as those with a cache that starts empty.

    Before: `keys = cat([detach_(lift_fresh_copy(empty)), new_keys], -2)`
    After:  `keys = new_keys`
    """
    changed = 0
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
            changed += 1
    return PassResult(changed)


def _is_empty(node: fx.Node) -> bool:
    """Return whether a node is a tensor of shape `[0]`, which `cat` ignores."""
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor) and value.ndim == 1 and isinstance(value.shape[0], int) and not value.shape[0]
    )


@contract(needs={UNGUARDED})
def drop_dead_scalars(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Erase size comparisons that only guards used."""
    changed = 0
    for node in reversed(graph.nodes):
        is_size = node.target is torch.ops.aten.sym_size.int or getattr(node.target, "__module__", "") == "_operator"
        if node.op == "call_function" and is_size and not node.users and node.target is not operator.setitem:
            graph.erase_node(node)
            changed += 1
    return PassResult(changed)


def drop_unread_writes(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Erase writes into fresh memory that nothing reads, such as initial weights of a layer created in a forward.

    Before: `w = empty([8, 8]); u = uniform_(w, -1, 1)`, and no more
    After:  nothing
    """
    changed = 0
    for root in graph.find_nodes(op="call_function", target=torch.ops.aten.empty.memory_format):
        family = _users(root)
        if all(_only_writes(node) for node in family):
            for node in [*reversed([node for node in graph.nodes if node in family]), root]:
                graph.erase_node(node)
            changed += 1
    return PassResult(changed)


def _users(node: fx.Node) -> set[fx.Node]:
    """Return the nodes that read a node, directly or through others that write into its memory."""
    found = set(node.users)
    for user in node.users:
        found |= _users(user) if _only_writes(user) else set()
    return found


def _only_writes(node: fx.Node) -> bool:
    """Return whether a node returns its first argument's memory, or only writes into it."""
    return is_mutable(node.target) or node.target is torch.ops.aten.detach.default


def drop_unread_calls(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Erase calls that no output reads, such as BERT's pooler if only its hidden states are returned."""
    changed = 0
    for node in reversed(graph.nodes):  # parameters stay, as for layers that a model does not call
        if node.op == "call_function" and not node.users and not node.is_impure():
            graph.erase_node(node)
            changed += 1
    return PassResult(changed)


@contract(leaves={COMPUTING})
def restore_aten(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Replace shape-only operators by the operators they stand for.

    Before: `y = gralora_shapes.linear(x, weight, bias); z = gralora_shapes.attention(y, ...)`
    After:  `y = aten.linear(x, weight, bias); z = gralora.attention(y, ...)`
    """
    changed = 0
    for node in graph.nodes:
        if node.op == "call_function" and node.target in STANDS_FOR:
            node.target = STANDS_FOR[node.target]
            changed += 1
    return PassResult(changed)


def cleaning_passes(graph_module: fx.GraphModule) -> tuple[Pass[fx.Graph], ...]:
    """Return the passes that clean a fresh graph."""
    inlining = inlining_passes() if _has_subgraphs(graph_module) else ()
    return (*inlining, drop_guards, plain_products, drop_empty_parts, drop_dead_scalars, drop_unread_writes)


def _has_subgraphs(graph_module: fx.GraphModule) -> bool:
    return any(isinstance(part, fx.GraphModule) for part in graph_module.modules() if part is not graph_module)


def inlining_passes() -> tuple[Pass[fx.Graph], ...]:
    """Return the passes that inline subgraphs and finish the regions that these were."""
    from gralora_fx.core.tracing.normalize.inline import inline_subgraphs
    from gralora_fx.core.tracing.normalize.regions import drop_idle_grad_regions, leave_after_errors

    return inline_subgraphs, drop_idle_grad_regions, leave_after_errors


def normalize(draft: Captured) -> Captured:
    """Return the draft with a live module's graph normalized, in evaluation mode, and what it does in either mode."""
    passes: tuple[Pass[fx.Graph], ...] = (
        *cleaning_passes(draft.graph_module),
        restore_aten,
        *_masks(draft),
        drop_unread_calls,
        AnnotateModes(not draft.evaluates, evaluated=draft.evaluated, kept=draft.kept),
        evaluate,
    )
    draft = run_passes(draft, passes)
    graph = draft.graph_module.graph
    return dataclasses.replace(draft, drawn=find_rng_op(graph), updated=updated_buffers(draft.graph_module))


def _masks(draft: Captured) -> tuple[Pass[fx.Graph], ...]:
    """Return the passes for a decoder step's masks, which its attention operators read."""
    if cache_layout(draft.sample) is not CacheLayout.DECODER:
        return ()
    from gralora_fx.core.operators.attention import padding_as_argument, without_empty_blocks

    return without_empty_blocks, padding_as_argument


def run_passes(draft: Captured, passes: tuple[Pass[fx.Graph], ...]) -> Captured:
    """Run passes over a copy of the draft's graph, exported or symbolic, and return the draft with it."""
    log = PassLog()
    graph_module = normalized(draft.graph_module, passes, log)
    return dataclasses.replace(draft, graph_module=graph_module, passes=tuple(log.reports))


def normalized(graph_module: fx.GraphModule, passes: tuple[Pass[fx.Graph], ...], log: PassLog) -> fx.GraphModule:
    """Run passes over a copy of an exported or symbolic graph, and return it over the same parameters and buffers."""
    graph = copy_graph(graph_module)
    graph.owning_module = graph_module
    given = frozenset() if _has_subgraphs(graph_module) else frozenset({INLINED})
    graph = Pipeline("normalize", passes, given=given, error=TraceError).run(graph, log)
    result = fx.GraphModule(graph_module, graph, type(graph_module).__name__.removesuffix("Impl"))
    result.graph.lint()
    return result
