"""Linear layers called in branches and loops: their weights are operands of the node that runs the subgraph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx

from gralora_fx.compat.pytree import tree_leaves

_KEY = "gralora_weights"
_hop = torch.ops.higher_order
# operator: positions of its subgraphs, of its operand lists, and of the list that is the same for every run
_OPERATORS: dict[Any, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    _hop.cond: ((1, 2), (3,), 3),
    _hop.while_loop: ((0, 1), (2, 3), 3),
    _hop.map_impl: ((0,), (1, 2), 2),
    _hop.scan: ((0,), (1, 2, 3), 3),
}


def weight_operands(node: fx.Node, root: torch.nn.Module) -> Iterator[tuple[fx.Node, int, int]]:
    """The parameters that a node's subgraphs use only as weights of linear calls.

    Args:
        node: A node.
        root: The module to which its targets refer.

    Yields:
        The `get_attr` node, the position of its operand list among the node's arguments, and its position in that list.
    """
    if node.target not in _OPERATORS:
        return
    _, _, fixed = _OPERATORS[node.target]
    for index, operand in enumerate(operands_of(node, fixed)):
        if isinstance(operand, fx.Node) and operand.op == "get_attr":
            uses = list(_uses(node, fixed, index, root))
            if uses and all(uses):
                yield operand, fixed, index


def note_weight(node: fx.Node, path: str, position: tuple[int, int]) -> None:
    """Annotate a node that runs subgraphs with the operand that is a layer's weight."""
    notes = node.meta.setdefault("custom", {}).setdefault(_KEY, {})
    notes[path] = [*(other for other in notes.get(path, []) if other != list(position)), list(position)]


def noted_weights(node: fx.Node, path: str) -> Sequence[Sequence[int]]:
    """Positions of the operands of a node that are a layer's weight."""
    positions: Sequence[Sequence[int]] = node.meta.get("custom", {}).get(_KEY, {}).get(path, ())
    return positions


def layers_in_subgraphs(graph: fx.Graph) -> dict[str, str]:
    """The operators that call layers from their subgraphs, by path of the layer."""
    return {path: str(node.target) for node in graph.nodes for path in node.meta.get("custom", {}).get(_KEY, {})}


def operands_of(node: fx.Node, group: int) -> list[Any]:
    """A list of operands of a node that runs subgraphs, by its position among the arguments."""
    return list(cast("Sequence[Any]", node.args[group]))


def replace_operand(node: fx.Node, position: tuple[int, int], value: fx.Node) -> None:
    """Replace an operand of a node.

    Args:
        node: A node that runs subgraphs.
        position: Position of the list among the node's arguments, and of the operand in the list.
        value: The operand.
    """
    group, index = position
    operands = operands_of(node, group)
    operands[index] = value
    node.update_arg(group, tuple(operands) if isinstance(node.args[group], tuple) else operands)


def _uses(node: fx.Node, group: int, index: int, root: torch.nn.Module) -> Iterator[bool]:
    """For each reader of an operand in the subgraphs, whether it is a linear call on it as its weight."""
    subgraphs, groups, _ = _OPERATORS[node.target]
    slot = sum(len(operands_of(node, before)) for before in groups if before < group) + index
    for position in subgraphs:
        module = root.get_submodule(str(cast("fx.Node", node.args[position]).target))
        placeholders = module.graph.find_nodes(op="placeholder") if isinstance(module, fx.GraphModule) else []
        if slot >= len(placeholders):
            yield False
            continue
        placeholder = placeholders[slot]
        for user in placeholder.users:
            if user.target in _OPERATORS:
                fixed = _OPERATORS[user.target][2]
                slots = [at for at, value in enumerate(operands_of(user, fixed)) if value is placeholder]
                others = [value for at, value in enumerate(user.args) if at != fixed]
                yield len(slots) == 1 and placeholder not in tree_leaves(others)
                for at in slots:
                    yield from _uses(user, fixed, at, module)
            else:
                others = [value for at, value in enumerate(user.args) if at != 1]
                yield (
                    user.target is torch.ops.aten.linear.default
                    and user.args[1] is placeholder
                    and placeholder not in others
                )
