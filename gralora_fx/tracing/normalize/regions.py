"""Regions of a graph that run without gradients or under autocast, as pairs of nodes around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect

from gralora_fx.compat import autocast
from gralora_fx.compat.calling_convention import code_transformer, convention_of
from gralora_fx.compat.pytree import tree_leaves
from gralora_fx.errors import ExportError
from gralora_fx.graph.module_tree import module_stack
from gralora_fx.graph.weight_views import tensor_at

_PREFIX = f"{__name__.replace('.', '_')}_"  # of the names that `fx` gives to functions of this file in its code
_INDENT = "    "


@has_side_effect
def enter_grad_mode(enabled: bool) -> bool:
    """Let the nodes that follow record gradients or not.

    Returns:
        The mode before, for `leave_grad_mode`.
    """
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(enabled)
    return before


@has_side_effect
def leave_grad_mode(before: bool) -> None:
    """Set the mode that `enter_grad_mode` found."""
    torch.set_grad_enabled(before)


@has_side_effect
def enter_autocast(device_type: str, dtype: torch.dtype | None, enabled: bool, cache_enabled: bool | None) -> Any:
    """Let the nodes that follow run under `torch.autocast` of these arguments.

    Returns:
        The context, for `leave_autocast`.
    """
    return autocast.enter_autocast(device_type, dtype, enabled, cache_enabled)


@has_side_effect
def leave_autocast(context: Any) -> None:
    """End what `enter_autocast` began."""
    autocast.leave_autocast(context)


LEAVE: dict[Callable[..., Any], Callable[..., Any]] = {
    enter_grad_mode: leave_grad_mode,
    enter_autocast: leave_autocast,
}


def drop_idle_grad_regions(graph: fx.Graph, root: nn.Module) -> None:
    """Drop the regions without gradients that no gradient would flow through anyway; in place.

    Before: `before = enter_grad_mode(False); y = cos(position_ids); leave_grad_mode(before); z = linear(x, w) * y`
    After:  `y = cos(position_ids); z = linear(x, w) * y`

    Angles of positions and masks, which transformers computes so, need no region. What depends on a parameter or on an
    input of floats does.

    Args:
        graph: A graph, every node with the value that tracing noted.
        root: The module that its targets belong to.
    """
    differentiable: set[fx.Node] = set()
    is_idle: dict[fx.Node, bool] = {}
    within: list[fx.Node] = []
    for node in graph.nodes:
        is_reached = _is_source(node, root) or not differentiable.isdisjoint(node.all_input_nodes)
        if is_reached and _may_need_gradient(node):
            differentiable.add(node)
            is_idle.update(dict.fromkeys(within, False))
        elif node.target is enter_grad_mode:
            within.append(node)
            is_idle[node] = True
        elif node.target is leave_grad_mode:
            within.remove(node.args[0])
    _drop_regions(graph, {enter for enter, idle in is_idle.items() if idle})


def drop_regions_for_inference(graph: fx.Graph) -> None:
    """Drop the regions that change no value: those without gradients, and those that turn autocast off; in place.

    Raises:
        ExportError: Autocast is on in one that is left; the message names a layer within it.
    """
    enters = [node for node in graph.nodes if node.target in LEAVE]
    _drop_regions(graph, {node for node in enters if node.target is enter_grad_mode or not node.args[2]})
    for enter in enters:
        if enter.target is enter_autocast and enter.args[2]:
            raise ExportError(
                f"{_place_after(enter)} runs under torch.autocast ({enter.args[1]}), whose casts are no part of the "
                "graph and so have no ONNX form; trace the model without autocast, and choose the precision at export"
            )


def _is_source(node: fx.Node, root: nn.Module) -> bool:
    """Whether gradients may be asked for a node: an input, a parameter, or what a module makes of its own."""
    if node.op == "get_attr":
        return isinstance(tensor_at(root, str(node.target)), nn.Parameter)
    return node.op in ("placeholder", "call_module")


def _may_need_gradient(node: fx.Node) -> bool:
    """Whether a node is a tensor that gradients are defined for, as far as tracing noted."""
    values = [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
    return "val" not in node.meta or any(value.is_floating_point() or value.is_complex() for value in values)


def _place_after(enter: fx.Node) -> str:
    """The layer that the first operator of a region belongs to, by its path, or that operator."""
    node = enter.next
    while node.target in LEAVE or node.op == "get_attr":
        node = node.next
    paths = [path for path, _ in module_stack(node) if path]
    return paths[-1] if paths else str(node.target)


def _drop_regions(graph: fx.Graph, enters: set[fx.Node]) -> None:
    for enter in enters:
        for leave in list(enter.users):
            graph.erase_node(leave)
        graph.erase_node(enter)


def leave_after_errors(graph: fx.Graph) -> None:
    """Let the code of a graph end its regions where an error leaves them, as a `with` block does.

    Before: `before = enter_grad_mode(False); y = linear(x, w); leave_grad_mode(before)`
    After:  `before = enter_grad_mode(False); try: y = linear(x, w); finally: leave_grad_mode(before)`

    Copies of the graph keep it, since it belongs to the way in which code is made of the nodes.

    Args:
        graph: A graph; it must be compiled afterwards.
    """
    if not isinstance(code_transformer(graph), _Blocks):
        graph.set_codegen(copy.copy(convention_of(graph)))  # copies of a graph share theirs
        graph.on_generate_code(_Blocks)


@dataclass(frozen=True)
class _Blocks:
    """Makes a `try` block of each region, in the lines that another transformer returns."""

    before: Callable[[list[str]], list[str]] | None

    def __call__(self, body: list[str]) -> list[str]:
        depth, is_empty, lines = 0, False, []
        for piece in body if self.before is None else self.before(body):
            is_statement = bool(piece.strip()) and not piece.lstrip().startswith((";", "#"))
            begins, ends = (is_statement and f"{_PREFIX}{verb}_" in piece for verb in ("enter", "leave"))
            if ends:
                lines += [f"{_INDENT * depth}pass\n"] if is_empty else []
                depth -= 1
                lines.append(f"{_INDENT * depth}finally:\n")
            lines.append(f"{_INDENT * (depth + ends)}{piece}" if is_statement else piece)
            if begins:
                lines.append(f"\n{_INDENT * depth}try:\n")
                depth += 1
            is_empty = begins or (is_empty and not is_statement)
        return lines
