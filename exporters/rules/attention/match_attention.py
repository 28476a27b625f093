"""Attention as one operator: PyTorch's own, and attention written out in a model, with heads folded or not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gralora_fx.core.operators.attention import DotProductAttention
from gralora_fx.core.operators.call import named_arguments
from gralora_fx.exporters.rules.attention.padding import MaskParts, hidden_padding, hides, selection_of, split_mask
from gralora_fx.exporters.translation.matching import (
    ADD,
    MUL,
    aten,
    expression,
    is_call,
    number,
    operands,
    reshaped,
    same_size,
    shape,
)

_PRODUCT = (aten.matmul.default, aten.bmm.default)
_DIVISION = (aten.div.Tensor, aten.div.Scalar)


def replace_softmax(graph: fx.Graph, softmax: fx.Node) -> str | bool:
    """Rewrite the attention around a softmax; return False if there is none, or why it is not plain attention."""
    product = _product_after(softmax)
    if product is None:
        return False
    scores = _scores_of(softmax, product)
    if isinstance(scores, str):
        return scores
    _replace(graph, product, scores)
    return True


def replace_operator(graph: fx.Graph, node: fx.Node) -> bool:
    """Rewrite PyTorch's own operator, if it has four axes and no dropout."""
    arguments = named_arguments(node)
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    if arguments["dropout_p"] or any(len(shape(part)) != 4 for part in (query, key, value)):
        return False
    size = expression(shape(query)[3])
    scale = arguments["scale"]
    if scale is None and not isinstance(size, int):
        return False
    scale = float(size) ** -0.5 if scale is None else float(scale)
    mask = arguments["attn_mask"]
    rest, padding = (None, None) if mask is None else split_mask(mask)
    with graph.inserting_before(node):
        call = DotProductAttention(query, key, value, rest, padding, scale, bool(arguments["is_causal"]))
        new = call.insert(graph)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


@dataclass(frozen=True)
class _Scores:
    """The scores that a softmax reads: `scale * query @ transpose(key)` and the terms added."""

    query: fx.Node
    transposed_key: fx.Node
    scale: float
    biases: tuple[fx.Node, ...]
    hidden: tuple[fx.Node, ...] = ()  # boolean, true at keys whose scores are replaced by a number that hides them
    padding: fx.Node | None = None  # `[batch, keys]`, if scores of padding are replaced by a number
    folded_biases: tuple[fx.Node, ...] = ()  # terms added before heads were taken out of the batch
    heads: int | None = None  # number of heads, if the product has them folded into the batch

    def times(self, factor: float) -> _Scores | None:
        """Return the scores times a number, or None if a term was added before."""
        is_product = not (self.biases or self.hidden or self.padding or self.folded_biases)
        return dataclasses.replace(self, scale=self.scale * factor) if is_product else None


def _product_after(softmax: fx.Node) -> fx.Node | None:
    """Return the product of attention weights and values, if it is the only reader of a softmax."""
    weights, users = softmax, list(softmax.users)
    if len(users) == 1 and is_call(users[0], aten._to_copy.default):
        weights, users = users[0], list(users[0].users)
    while len(users) == 1 and reshaped(users[0]) is weights:
        weights, users = users[0], list(users[0].users)
    is_product = len(users) == 1 and is_call(users[0], *_PRODUCT) and users[0].args[0] is weights
    return users[0] if is_product else None


def _scores_of(softmax: fx.Node, product: fx.Node) -> _Scores | str:
    """Return the scores that a softmax between two products reads, or why that is not plain attention."""
    rank = len(shape(softmax))
    axis = softmax.args[1] if len(softmax.args) > 1 else None
    if not isinstance(axis, int) or axis % rank != rank - 1:
        return "its softmax is not over the keys"
    source = softmax.args[0]
    if not isinstance(source, fx.Node) or source.meta["val"].dtype != product.meta["val"].dtype:
        return "its softmax is computed in another precision than its products"
    scores = _read(source)
    if scores is None:
        return "its scores are more than queries times keys and what is added to them"
    if len(shape(scores.query)) == 4 == len(shape(product.args[1])) or scores.heads is not None:
        return scores
    return f"its scores have {rank} axes, and the operator takes batch, heads, queries and keys"


def _read(node: Any) -> _Scores | None:
    if is_call(node, *_PRODUCT):
        query, key = node.args
        return _Scores(query, key, 1.0, ()) if len(shape(query)) == len(shape(key)) in (3, 4) else None
    if is_call(node, aten.baddbmm.default) and node.kwargs.get("beta", 1) == 1:
        bias, query, key = node.args
        return _Scores(query, key, float(node.kwargs.get("alpha", 1)), (), folded_biases=(bias,))
    folded = refolded(node)
    if folded is not None:
        scores = _read(folded)
        return None if scores is None else dataclasses.replace(scores, heads=heads_of(node) or heads_of(folded))
    for targets, power in ((MUL, 1), (_DIVISION, -1)):
        factors = operands(node, *targets)
        if factors is not None and number(factors[1]):
            scores = _read(factors[0])
            return None if scores is None else scores.times(float(factors[1]) ** power)
    terms = operands(node, *ADD)
    for one, other in (terms, terms[::-1]) if terms is not None else ():
        scores = _read(one)
        if scores is not None and isinstance(other, fx.Node) and _is_mask(other, node):
            return dataclasses.replace(scores, biases=(*scores.biases, other))
    selection = selection_of(node)
    if selection is not None and hides(selection[1]) and _is_of_keys(selection[0], node):
        scores = _read(selection[2])
        return None if scores is None else dataclasses.replace(scores, hidden=(*scores.hidden, selection[0]))
    if selection is not None and hides(selection[2]) and isinstance(selection[0], fx.Node):
        scores, mask = _read(selection[1]), split_mask(selection[0])
        if scores is not None and scores.padding is None and mask.rest is None and mask.padding is not None:
            return dataclasses.replace(scores, padding=mask.padding)
    return None


def _is_mask(mask: fx.Node, scores: fx.Node) -> bool:
    """Return whether a mask has the axes that the operator takes, beside scores with or without folded heads."""
    return len(shape(mask)) == 2 or (len(shape(scores)) == 4 and len(shape(mask)) <= 4)


def _is_of_keys(hidden: fx.Node, scores: fx.Node) -> bool:
    """Return whether a mask hides the same keys from every query, and never all of them."""
    source: Any = hidden
    while is_call(source, aten.expand.default, aten.expand_as.default):
        source = source.args[0]
    sizes = shape(source)
    return _is_mask(source, scores) and len(sizes) == 4 and expression(sizes[2]) == 1


def _replace(graph: fx.Graph, product: fx.Node, scores: _Scores) -> None:
    """Insert the operator in place of the second product."""
    value = product.args[1]
    assert isinstance(value, fx.Node)
    with graph.inserting_before(product):
        if scores.heads is not None:
            unfolded = (with_heads(graph, bias, scores.heads) for bias in scores.folded_biases)
            scores = dataclasses.replace(scores, biases=(*scores.biases, *unfolded))
        mask, padding = _mask(graph, scores)
        query, key = scores.query, _untransposed(graph, scores.transposed_key)
        if scores.heads is not None:
            query, key, value = (with_heads(graph, part, scores.heads) for part in (query, key, value))
        call = DotProductAttention(query, key, value, mask, padding, scores.scale, is_causal=False)
        new = call.insert(graph)
        folded = len(shape(product)) == 3
        new.meta = dict(product.meta)
        if folded:
            sizes = [*query.meta["val"].shape[:3], value.meta["val"].shape[3]]
            new.meta["val"] = query.meta["val"].new_empty(sizes)
            replace_folded(graph, new, product)
        else:
            product.replace_all_uses_with(new)
    graph.erase_node(product)


def _mask(graph: fx.Graph, scores: _Scores) -> MaskParts:
    """Return one mask of the terms added to scores and the numbers that replace them, with the padding apart."""
    mask: fx.Node | None = None
    padding = scores.padding
    for bias in scores.biases:
        parts = split_mask(bias)
        rest: fx.Node | None = bias
        if parts.padding is not None and padding in (None, parts.padding):
            padding, rest = parts.padding, parts.rest
        if mask is None or rest is None:
            mask = rest if mask is None else mask
        else:
            mask = _added(graph, aten.add.Tensor, mask, rest)
    for hidden in scores.hidden:
        row = hidden_padding(hidden)
        if row is not None and padding in (None, row):
            padding = row
        elif mask is None:
            mask = _added(graph, aten.logical_not.default, hidden)
        elif mask.meta["val"].dtype == torch.bool:
            mask = _added(graph, aten.logical_and.default, mask, _added(graph, aten.logical_not.default, hidden))
        else:
            smallest = torch.finfo(mask.meta["val"].dtype).min
            wide = _added(
                graph,
                aten.mul.Tensor,
                _added(graph, aten._to_copy.default, hidden, dtype=mask.meta["val"].dtype),
                smallest,
            )
            mask = _added(graph, aten.minimum.default, mask, wide)
    return MaskParts(mask, padding)


def _added(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call whose metadata has the value that tracing would record."""
    node = graph.call_function(target, args, kwargs)
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    node.meta = {**args[0].meta, "val": target(*values, **kwargs)}
    return node


def _untransposed(graph: fx.Graph, key: Any) -> fx.Node:
    """Return the key `[..., keys, size]` given its transpose."""
    if (source := refolded(key)) is not None and is_call(source, aten.transpose.int, aten.permute.default):
        key = source
    rank = len(shape(key))
    arguments: list[Any] = list(key.args)
    if is_call(key, aten.transpose.int) and {axis % rank for axis in arguments[1:]} == {rank - 2, rank - 1}:
        untransposed: fx.Node = arguments[0]
        return untransposed
    if is_call(key, aten.permute.default):
        axes = [axis % rank for axis in arguments[1]]
        node = graph.call_function(aten.permute.default, (arguments[0], [*axes[:-2], axes[-1], axes[-2]]))
    else:
        node = graph.call_function(aten.transpose.int, (key, rank - 2, rank - 1))
    node.meta = {**key.meta, "val": key.meta["val"].transpose(-2, -1)}
    return node


def refolded(node: Any) -> fx.Node | None:
    """Return the source of a node that only folds heads into the batch or takes them out of it; None for others.

    Before: `x` of `[batch, heads, length, size]`
    After:  `reshape(x)` of `[batch * heads, length, size]`, or the reverse
    """
    source = node.args[0] if is_call(node, aten.expand.default) else reshaped(node)
    if not isinstance(source, fx.Node):
        return None
    before, after = shape(source), shape(node)
    is_same = {len(before), len(after)} <= {3, 4} and all(map(same_size, before[-2:], after[-2:]))
    if is_call(node, aten.expand.default):
        is_same = is_same and len(before) == len(after) and all(map(same_size, before, after))
    return source if is_same else None


def heads_of(node: Any) -> int | None:
    """Return the number of heads of a tensor of four axes; None if it has other axes or the number is not fixed."""
    sizes = shape(node)
    heads = expression(sizes[1]) if len(sizes) == 4 else None
    return heads if isinstance(heads, int) else None


def with_heads(graph: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """Return a tensor as `[batch, heads, length, size]`: its source before heads were folded, or else unflattened."""
    source: fx.Node | None = node
    while source is not None and heads_of(source) != heads:
        source = refolded(source)
    if source is not None:
        return source
    apart = graph.call_function(aten.unflatten.int, (node, 0, [-1, heads]))
    value = node.meta["val"]
    apart.meta = {**node.meta, "val": value.unflatten(0, [value.shape[0] // heads, heads])}
    return apart


def replace_folded(graph: fx.Graph, new: fx.Node, old: fx.Node) -> None:
    """Let readers of a product with folded heads read its counterpart `[batch, heads, length, size]`."""
    for user in list(old.users):
        if refolded(user) is old and all(map(same_size, shape(user), shape(new))) and len(shape(user)) == 4:
            user.replace_all_uses_with(new)
    if old.users:
        folded = graph.call_function(aten.flatten.using_ints, (new, 0, 1))
        folded.meta = dict(old.meta)
        old.replace_all_uses_with(folded, delete_user_cb=lambda user: user is not folded)
