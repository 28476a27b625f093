"""Linear calls: nodes that multiply an activation by a weight parameter, themselves or in a branch or a loop.

Of a layer called in a branch or a loop, the weight is an operand of the node that runs the subgraph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from gralora_fx.base.compat.torch_graphs import tree_leaves
from gralora_fx.core.graph.weight_views import Origin, origin_of

_aten = torch.ops.aten
_LINEAR = {_aten.linear.default, torch.nn.functional.linear}
_ADDMM = {_aten.addmm.default, torch.addmm}
_MATMUL = {_aten.matmul.default, _aten.mm.default, torch.matmul, torch.mm, operator.matmul, "matmul", "mm"}

WEIGHTS = "gralora_weights"  # of the annotation that names layers by their operands
_hop = torch.ops.higher_order
# operator: positions of its subgraphs, of its operand lists, and of the list that is the same for every run
_OPERATORS: dict[Any, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    _hop.cond: ((1, 2), (3,), 3),
    _hop.while_loop: ((0, 1), (2, 3), 3),
    _hop.map_impl: ((0,), (1, 2), 2),
    _hop.scan: ((0,), (1, 2, 3), 3),
}


@dataclass(frozen=True)
class LinearCall:
    """One node that multiplies an input by a weight.

    Attributes:
        node: The node whose value is `input @ weight` (with the bias, if the operator adds it).
        input: The activation, `[..., in]`.
        weight: The `get_attr` node of the weight, or the node that computes it.
        bias: The `get_attr` node of the bias, or None.
        stored_transposed: Whether the weight is `[in, out]` rather than `[out, in]`.
        rows: Range of output features, if the call uses only a part of the weight, as `nn.MultiheadAttention` does with
            its `in_proj_weight`; None if it uses the whole.
        operand: For a call inside a branch or a loop: the position of the weight among the operands of the node that
            runs it. `input` is then that node itself, not the layer's input.
        added: What the operator adds to the product: the bias's node, or one that computes it or cuts a part of it.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stored_transposed: bool
    rows: tuple[int, int] | None = None
    operand: tuple[int, int] | None = None
    added: fx.Node | None = None


def match_linear_call(node: fx.Node, *, computed: bool = False) -> LinearCall | None:
    """Match `linear(x, w, b)`, `addmm(b, x, w)` and `x @ w`, where `w` is a parameter, its transpose or some rows."""
    if node.op not in ("call_function", "call_method"):
        return None
    operands: list[object] = [*node.args, *node.kwargs.values()]
    bias: object = None
    if node.target in _LINEAR and len(operands) in (2, 3):
        x, operand, bias = operands if len(operands) == 3 else (*operands, None)
        multiplies_transpose = True
    elif node.target in _ADDMM and len(operands) == 3:
        bias, x, operand = operands
        multiplies_transpose = False
    elif node.target in _MATMUL and len(operands) == 2:
        x, operand = operands
        multiplies_transpose = False
    else:
        return None
    weight = origin_of(operand)
    if weight is None and computed and multiplies_transpose and isinstance(operand, fx.Node):
        weight = Origin(operand)
    if not isinstance(x, fx.Node) or weight is None:
        return None
    stored_transposed = multiplies_transpose == weight.is_transposed
    if weight.rows is not None and stored_transposed:
        return None
    bias_origin = origin_of(bias)
    bias_node = None if bias_origin is None else bias_origin.node
    added = bias if isinstance(bias, fx.Node) else None
    return LinearCall(node, x, weight.node, bias_node, stored_transposed, weight.rows, added=added)


def calls_at(node: fx.Node, path: str) -> tuple[LinearCall, ...]:
    """The calls of the layer at a path made by a node, itself or in a subgraph that it runs."""
    positions = noted_weights(node, path)
    if positions:
        return tuple(_subgraph_call(node, (group, index)) for group, index in positions)
    call = match_linear_call(node, computed=True)
    return () if call is None else (call,)


def subgraph_calls(node: fx.Node, root: nn.Module) -> Iterator[LinearCall]:
    """The calls of layers in the subgraphs that a node runs: of parameters that those use only as weights."""
    if node.target not in _OPERATORS:
        return
    _, _, fixed = _OPERATORS[node.target]
    for index, operand in enumerate(_operands(node, fixed)):
        if isinstance(operand, fx.Node) and operand.op == "get_attr":
            uses = list(_uses(node, fixed, index, root))
            if uses and all(uses):
                yield _subgraph_call(node, (fixed, index))


def _subgraph_call(node: fx.Node, position: tuple[int, int]) -> LinearCall:
    group, index = position
    weight: fx.Node = _operands(node, group)[index]
    return LinearCall(node, node, weight, None, stored_transposed=False, operand=position)


def note_weight(node: fx.Node, path: str, position: tuple[int, int]) -> None:
    """Annotate a node that runs subgraphs with the operand that is a layer's weight."""
    notes = node.meta.setdefault("custom", {}).setdefault(WEIGHTS, {})
    notes[path] = [*(other for other in notes.get(path, []) if other != list(position)), list(position)]


def noted_weights(node: fx.Node, path: str) -> Sequence[Sequence[int]]:
    """Positions of the operands of a node that are a layer's weight."""
    positions: Sequence[Sequence[int]] = node.meta.get("custom", {}).get(WEIGHTS, {}).get(path, ())
    return positions


def replace_operand(node: fx.Node, position: tuple[int, int], value: fx.Node) -> None:
    """Replace an operand of a node."""
    group, index = position
    operands = _operands(node, group)
    operands[index] = value
    node.update_arg(group, tuple(operands) if isinstance(node.args[group], tuple) else operands)


def _operands(node: fx.Node, group: int) -> list[Any]:
    """A list of operands of a node that runs subgraphs, by its position among the arguments."""
    return list(cast("Sequence[Any]", node.args[group]))


def _uses(node: fx.Node, group: int, index: int, root: nn.Module) -> Iterator[bool]:
    """For each reader of an operand in the subgraphs, whether it is a linear call on it as its weight."""
    subgraphs, groups, _ = _OPERATORS[node.target]
    slot = sum(len(_operands(node, before)) for before in groups if before < group) + index
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
                slots = [at for at, value in enumerate(_operands(user, fixed)) if value is placeholder]
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
