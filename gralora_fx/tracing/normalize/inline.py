"""Inlining of subgraphs that run exactly once."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from gralora_fx.compat.torch_graphs import tree_info, tree_leaves
from gralora_fx.graph.module_tree import module_stack
from gralora_fx.graph.pipeline import PassResult, contract
from gralora_fx.graph.surgery import module_of
from gralora_fx.tracing.normalize.regions import INLINED, LEAVE, enter_autocast, enter_grad_mode

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
# those that run it in another mode: the function that enters the mode, given the arguments before the subgraph
_REGIONS: dict[Any, Any] = {
    _hop.wrap_with_set_grad_enabled: enter_grad_mode,
    _hop.wrap_with_autocast: enter_autocast,
}


@contract(leaves={INLINED})
def inline_subgraphs(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Inline subgraphs that run exactly once into the calling graph.

    Before: `y = wrap_with_set_grad_enabled(False, self.submod, x, w)[0]`
    After:  `before = enter_grad_mode(False); y = linear(x, w); leave_grad_mode(before)`

    So linear calls in them can be found. Regions without gradients or under autocast are kept; a checkpoint computes
    the same but saves no memory. Branches and loops (`torch.cond` and the like) stay subgraphs.

    Args:
        graph: A graph; it is changed in place.
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
    """Replace a call of a subgraph by the subgraph's nodes.

    Args:
        node: The call, of a module or by an operator.
        inner: The subgraph.
        operands: The values of its placeholders, in their order.
        path: Path of the module that its targets belong to.

    Returns:
        The nodes that replace the call, in reverse order.
    """
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
    """Whether a module has hooks, which its graph does not show."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _operands(module: nn.Module, node: fx.Node) -> Sequence[Any] | None:
    """The operands of a nested `GraphModule`'s placeholders in a call; None if they cannot be determined."""
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
    """The metadata of an inlined node; module paths of a separately traced subgraph are prefixed with the call's."""
    meta = dict(part.meta)
    if "custom" in meta:
        meta["custom"] = dict(meta["custom"])
    if call.op == "call_module":
        below = {f"{path}.{name}": (f"{path}.{name}", kind) for name, kind in module_stack(part) if name}
        meta["nn_module_stack"] = {**call.meta.get("nn_module_stack", {}), **below}
    return meta


def _replace_value(node: fx.Node, value: Any) -> None:
    """Replace a node by its value, which may be a tuple of nodes whose items the readers take, and erase it."""
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
