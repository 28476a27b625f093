"""Attention as one operator: PyTorch's own, and what models compute by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from gralora_fx.exporters.fx_passes.matching import ADD, MUL, aten, expression, is_call, number, operands, shape
from gralora_fx.exporters.fx_passes.padding import Selection, selection, split_mask
from gralora_fx.exporters.pipeline import PassResult
from gralora_fx.exporters.reports import AttentionSummary, Skip
from gralora_fx.graph.module_tree import module_stack
from gralora_fx.operators.call import named_arguments
from gralora_fx.operators.constant_sizes import Reshape
from gralora_fx.operators.dot_product_attention import DotProductAttention

_SDPA = aten.scaled_dot_product_attention.default
_PRODUCT = (aten.matmul.default, aten.bmm.default)
_DIVISION = (aten.div.Tensor, aten.div.Scalar)


def match_attention(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Rewrite attention without a cache as one operator, with padding apart from the rest of its mask.

    Before: `y = softmax(query @ transpose(key) * scale + bias + where(padding, 0, smallest)) @ value`
    After:  `y = dot_product_attention(query, key, value, bias, padding, scale)`

    Likewise for `scaled_dot_product_attention`.

    Args:
        graph: A traced graph in evaluation mode; it is changed in place.

    Returns:
        The number of matches; as skipped, softmaxes between two products that are something else.
    """
    count, skipped = 0, []
    for node in list(graph.nodes):
        if is_call(node, _SDPA):
            count += _as_operator(graph, node)
        elif is_call(node, aten.softmax.int, aten._softmax.default):
            product = _product_after(node)
            if product is None:
                continue
            scores = _scores_of(node, product)
            if isinstance(scores, str):
                skipped.append(Skip(layer_of(node), scores))
            else:
                _replace(graph, product, scores)
                count += 1
    graph.eliminate_dead_code()
    found = AttentionSummary(0, {skip.place: skip.reason for skip in skipped}) if skipped else None
    return PassResult(count, tuple(skipped), summary=found)


def layer_of(node: fx.Node) -> str:
    """The path of the module in which a node was traced."""
    paths = [path for path, _ in module_stack(node) if path]
    return paths[-1] if paths else node.name


def _as_operator(graph: fx.Graph, node: fx.Node) -> bool:
    """Rewrite PyTorch's own operator, if it has four axes and no dropout."""
    given = named_arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    if given["dropout_p"] or any(len(shape(part)) != 4 for part in (query, key, value)):
        return False
    size = expression(shape(query)[3])
    scale = given["scale"]
    if scale is None and not isinstance(size, int):
        return False
    scale = float(size) ** -0.5 if scale is None else float(scale)
    mask = given["attn_mask"]
    found = split_mask(mask) if mask is not None else None
    rest, padding = (None, None) if found is None else found
    with graph.inserting_before(node):
        call = DotProductAttention(query, key, value, rest, padding, scale, bool(given["is_causal"]))
        new = call.insert(graph)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


@dataclass(frozen=True)
class _Scores:
    """Scores that a softmax reads: `scale * query @ transpose(key)`, what is added, and what hides keys at last."""

    query: fx.Node
    transposed_key: fx.Node
    scale: float = 1.0
    biases: tuple[fx.Node, ...] = ()
    hidden: Selection | None = None

    def times(self, factor: float) -> _Scores | None:
        """The scores times a number, if nothing was added before."""
        return None if self.biases or self.hidden else replace(self, scale=self.scale * factor)

    def plus(self, bias: Any) -> _Scores | None:
        """The scores plus a mask or a bias, if no keys were hidden before."""
        is_mask = isinstance(bias, fx.Node) and len(shape(bias)) <= 4
        return replace(self, biases=(*self.biases, bias)) if is_mask and self.hidden is None else None


def _product_after(softmax: fx.Node) -> fx.Node | None:
    """The product of attention weights and values that reads a softmax alone."""
    weights, users = softmax, list(softmax.users)
    while len(users) == 1 and is_call(users[0], aten._to_copy.default, aten.reshape.default, Reshape.target):
        weights, users = users[0], list(users[0].users)
    is_product = len(users) == 1 and is_call(users[0], *_PRODUCT) and users[0].args[0] is weights
    return users[0] if is_product else None


def _scores_of(softmax: fx.Node, product: fx.Node) -> _Scores | str:
    """What a softmax between two products reads, or why that is not plain attention."""
    rank = len(shape(softmax))
    axis = softmax.args[1] if len(softmax.args) > 1 else None
    if not isinstance(axis, int) or axis % rank != rank - 1:
        return "its softmax is not over the keys"
    source = softmax.args[0]
    if not isinstance(source, fx.Node) or source.meta["val"].dtype != product.meta["val"].dtype:
        return "its softmax is computed in another precision than its products"
    axes = len(shape(product.args[1]))
    if rank != 4 or axes != 4:
        return f"its products have {min(rank, axes)} axes, and the operator takes batch, heads, queries and keys"
    scores = _read(source)
    return "its scores are more than queries times keys and what is added to them" if scores is None else scores


def _read(node: Any) -> _Scores | None:
    if is_call(node, *_PRODUCT):
        query, key = node.args
        return _Scores(query, key) if len(shape(query)) == len(shape(key)) == 4 else None
    for targets, power in ((MUL, 1), (_DIVISION, -1)):
        factors = operands(node, *targets)
        if factors is not None and number(factors[1]):
            scores = _read(factors[0])
            return None if scores is None else scores.times(float(factors[1]) ** power)
    terms = operands(node, *ADD)
    for one, other in (terms, terms[::-1]) if terms is not None else ():
        scores = _read(one)
        if scores is not None:
            return scores.plus(other)
    found = selection(node)
    scores = None if found is None else _read(found.shown)
    return None if scores is None or scores.hidden is not None else replace(scores, hidden=found)


def _replace(graph: fx.Graph, product: fx.Node, scores: _Scores) -> None:
    """Insert the operator in place of the second product."""
    found = [split_mask(bias) for bias in scores.biases]
    paddings = {mask.padding for mask in found if mask.padding is not None}
    hidden = scores.hidden
    if hidden is not None and hidden.padding is not None:
        paddings.add(hidden.padding)
        hidden = None
    padding = paddings.pop() if len(paddings) == 1 else None
    rests = [mask.rest for mask in found] if padding is not None else list(scores.biases)
    value = product.args[1]
    assert isinstance(value, fx.Node)
    with graph.inserting_before(product):
        mask = _sum(graph, [rest for rest in rests if rest is not None])
        hidden = scores.hidden if padding is None else hidden
        if hidden is not None:
            mask = _hide(graph, hidden, mask)
        key = _untransposed(graph, scores.transposed_key)
        call = DotProductAttention(scores.query, key, value, mask, padding, scores.scale, is_causal=False)
        new = call.insert(graph)
    new.meta = dict(product.meta)
    product.replace_all_uses_with(new)
    graph.erase_node(product)


def _sum(graph: fx.Graph, biases: list[fx.Node]) -> fx.Node | None:
    total: fx.Node | None = None
    for bias in biases:
        before = total
        total = bias if before is None else graph.call_function(aten.add.Tensor, (before, bias))
        if before is not None:
            total.meta = {**bias.meta, "val": before.meta["val"] + bias.meta["val"]}
    return total


def _hide(graph: fx.Graph, hidden: Selection, bias: fx.Node | None) -> fx.Node:
    """A mask that hides keys by a condition, and adds a bias to the others."""
    shown = hidden.condition
    if not hidden.is_shown:
        shown = graph.call_function(aten.logical_not.default, (hidden.condition,))
        shown.meta = dict(hidden.condition.meta)
    if bias is None:
        return shown
    smallest = torch.finfo(bias.meta["val"].dtype).min
    mask = graph.call_function(aten.where.ScalarOther, (shown, bias, smallest))
    mask.meta = {**bias.meta, "val": torch.where(shown.meta["val"], bias.meta["val"], smallest)}
    return mask


def _untransposed(graph: fx.Graph, key: Any) -> fx.Node:
    """The key `[batch, heads, keys, size]` of its transpose."""
    arguments: list[Any] = list(key.args)
    if is_call(key, aten.transpose.int) and {axis % 4 for axis in arguments[1:]} == {2, 3}:
        source: fx.Node = arguments[0]
        return source
    if is_call(key, aten.permute.default):
        axes = [axis % 4 for axis in arguments[1]]
        node = graph.call_function(aten.permute.default, (arguments[0], [*axes[:2], axes[3], axes[2]]))
    else:
        node = graph.call_function(aten.transpose.int, (key, 2, 3))
    node.meta = {**key.meta, "val": key.meta["val"].transpose(2, 3)}
    return node
