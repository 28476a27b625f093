"""Normalization as the runtime's fused operators, with the residual addition before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.operators.call import named_arguments
from gralora_fx.core.operators.layers import RmsNorm
from gralora_fx.exporters.rules.builder import MICROSOFT, SITES, Builder, replace_value, static_dim
from gralora_fx.exporters.rules.onnx_pipeline import APART_ADDITIONS, ONE_SPELLING, SIMPLIFIED
from gralora_fx.exporters.translation.matching import ADD, MUL, aten, is_call, number, operands, shape
from gralora_fx.exporters.translation.operators import RmsNormNode


@contract(needs={SIMPLIFIED, ONE_SPELLING})
def match_rms_norms(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Rewrite root-mean-square normalisations as one operator each.

    Before: `y = x * rsqrt(mean(x ** 2, -1) + eps) * weight`
    After:  `y = rms_norm(x, weight, eps)`
    """
    count = 0
    for node in list(graph.nodes):
        if is_call(node, aten.rms_norm.default):
            _as_operator(node)
            count += 1
            continue
        match = _normalised(node)
        if match is None:
            continue
        x, eps = match
        source, last = _without_casts(x, node)
        end, weight = _weighted(last, shape(x)[-1])
        with graph.inserting_before(end):
            norm = RmsNorm(source, weight, eps).insert(graph)
        norm.meta = dict(end.meta)
        end.replace_all_uses_with(norm)
        count += 1
    graph.eliminate_dead_code()
    return PassResult(count)


def _as_operator(node: fx.Node) -> None:
    """Rewrite PyTorch's own operator as ours, if it normalises the last axis alone."""
    norm = named_arguments(node)
    if len(norm["normalized_shape"]) == 1:
        eps = torch.finfo(node.meta["val"].dtype).eps if norm["eps"] is None else norm["eps"]
        RmsNorm(norm["input"], norm["weight"], eps).write(node)


def _normalised(node: fx.Node) -> tuple[fx.Node, float] | None:
    """Return `(x, eps)` of a node `x * rsqrt(mean(x ** 2, -1) + eps)`; None for anything else."""
    factors = operands(node, *MUL)
    if factors is None:
        return None
    for x, root in (factors, factors[::-1]):
        if not is_call(root, aten.rsqrt.default):
            continue
        terms = operands(root.args[0], *ADD)
        if terms is None:
            continue
        for mean, eps in (terms, terms[::-1]):
            if number(eps) is not None and _mean_of_squares(mean) is x:
                return x, float(eps)
    return None


def _mean_of_squares(node: Any) -> Any:
    """Return `x` of a node `mean(x ** 2, -1, keepdim=True)`; None for anything else."""
    if not is_call(node, aten.mean.dim) or len(node.args) < 3 or not node.args[2]:
        return None
    square, (axis, *more) = node.args[0], node.args[1]
    if more or axis % len(shape(square)) != len(shape(square)) - 1:
        return None
    if is_call(square, aten.square.default) or (
        is_call(square, aten.pow.Tensor_Scalar) and number(square.args[1]) == 2.0
    ):
        return square.args[0]
    factors = operands(square, *MUL)
    return factors[0] if factors is not None and factors[0] is factors[1] else None


def _without_casts(x: fx.Node, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return input and result without casts to float32 and back: the operator computes in float32 anyway."""
    users = list(node.users)
    if not is_call(x, aten._to_copy.default) or len(users) != 1 or not is_call(users[0], aten._to_copy.default):
        return x, node
    before = x.args[0]
    assert isinstance(before, fx.Node)
    same = before.meta["val"].dtype == users[0].meta["val"].dtype
    return (before, users[0]) if same and x.meta["val"].dtype == torch.float32 else (x, node)


def _weighted(node: fx.Node, size: Any) -> tuple[fx.Node, fx.Node | None]:
    """Return the multiplication by a weight after a node, and the weight; or the node itself and None."""
    users = list(node.users)
    factors = operands(users[0], *MUL) if len(users) == 1 else None
    if factors is None:
        return node, None
    weight = factors[1] if factors[0] is node else factors[0]
    if not isinstance(weight, fx.Node) or shape(weight) != (size,):
        return node, None
    same = weight.meta["val"].dtype == users[0].meta["val"].dtype == node.meta["val"].dtype
    return (users[0], weight) if same else (node, None)


@contract(needs={APART_ADDITIONS}, ends={APART_ADDITIONS})
@dataclass(frozen=True)
class LowerNorms:
    """Replace normalizations by the runtime's operators, an RMS norm by ONNX's `RMSNormalization`.

    Before: `s = Add(x, r); y = RMSNormalization(s, weight)`
    After:  `y, s = SkipSimplifiedLayerNormalization(x, r, weight)`

    Before: `s = Add(Add(MatMul(x, W), b), r); y = LayerNormalization(s, weight, shift)`
    After:  `y, s = SkipLayerNormalization(MatMul(x, W), r, weight, shift, b)`

    ONNX Runtime would fuse that bias itself only without an adapter in between, and so add in another order.
    """

    fuses_additions: bool = True  # whether to fuse them with the residual addition before them

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Replace them, in place, the nodes sorted; the result counts additions fused and RMS norms replaced."""
        changed = 0
        for node in list(model.graph):
            norm = RmsNormNode.of(node)
            if norm is None and node.op_type != "LayerNormalization":
                continue
            addition = _residual(node) if self.fuses_additions else None
            if addition is not None:
                _fuse(model.graph, node, addition, norm)
                changed += 1
            elif norm is not None:
                build = Builder(model.graph)
                weight = norm.weight or _ones(build, node, norm.x)
                build.replace(node, build("RMSNormalization", norm.x, weight, epsilon=norm.eps))
                changed += 1
            if self.fuses_additions:
                model.graph.sort()
        return PassResult(changed)


def _residual(node: ir.Node) -> ir.Node | None:
    """Return the addition of two tensors of equal shape that a normalization over the last of three axes reads."""
    x = node.inputs[0]
    addition = None if x is None else x.producer()
    axis = node.attributes.get("axis")
    if addition is None or addition.op_type != "Add" or (axis is not None and axis.as_int() not in (-1, 2)):
        return None
    shapes = [None if value is None or value.shape is None else list(value.shape) for value in addition.inputs]
    same = shapes[0] is not None and len(shapes[0]) == 3 and shapes[0] == shapes[1]
    if any(_is_made_of(value, addition) for value in node.inputs[1:]):
        return None  # a weight of ones whose size is read from the sum
    return addition if same and not any(output.is_graph_output() for output in node.outputs[1:]) else None


def _is_made_of(value: ir.Value | None, node: ir.Node) -> bool:
    """Return whether a value depends on a node's outputs."""
    seen, waiting = set(), [value]
    while waiting:
        current = waiting.pop()
        producer = None if current is None else current.producer()
        if producer is node:
            return True
        if producer is not None and producer not in seen:
            seen.add(producer)
            waiting.extend(producer.inputs)
    return False


def _fuse(graph: ir.Graph, node: ir.Node, addition: ir.Node, norm: RmsNormNode | None) -> None:
    build = Builder(graph)
    terms, rest = list(addition.inputs), list[ir.Value | None]()
    if norm is not None:
        op_type, weight, eps = "SkipSimplifiedLayerNormalization", norm.weight, norm.eps
    else:
        op_type, weight = "SkipLayerNormalization", node.inputs[1]
        eps = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        terms, bias = _without_bias(terms)
        rest = [node.inputs[2] if len(node.inputs) > 2 else None, bias]
    inputs = [*terms, weight or _ones(build, node, addition.inputs[0]), *rest]
    fused = build.node(op_type, inputs, domain=MICROSOFT, num_outputs=4, epsilon=eps)
    for unused in fused.outputs[1:3]:
        unused.name = ""
    replace_value(fused.outputs[0], node.outputs[0])
    replace_value(fused.outputs[3], addition.outputs[0])
    build.insert_before(node)
    graph.remove([node, addition], safe=True)  # a bias's own addition has no reader then, and goes with unused nodes


def _without_bias(terms: Sequence[ir.Value | None]) -> tuple[list[ir.Value | None], ir.Value | None]:
    """Return the two terms of a residual addition, and a linear layer's bias taken out of one of them, or None."""
    for index, term in enumerate(terms):
        node = None if term is None else term.producer()
        if term is None or node is None or node.op_type != "Add" or len(term.uses()) != 1 or term.is_graph_output():
            continue
        bias = next((v for v in node.inputs if v is not None and v.is_initializer()), None)
        product = next((v for v in node.inputs if v is not bias), None)
        producer = None if product is None else product.producer()
        if bias is None or bias.shape is None or len(bias.shape) != 1 or product is None or len(product.uses()) != 1:
            continue
        if producer is not None and producer.op_type == "MatMul" and static_dim(bias, 0) == static_dim(term, -1):
            if SITES in term.meta:
                product.meta[SITES] = term.meta[SITES]  # adapters are added before the bias
            return [product if i == index else other for i, other in enumerate(terms)], bias
    return list(terms), None


def _ones(build: Builder, node: ir.Node, like: ir.Value | None) -> ir.Value:
    """Build a weight of ones for a normalization of tensors like another."""
    size, dtype = static_dim(like, -1), node.outputs[0].dtype or ir.DataType.FLOAT
    if size is not None:
        return build.tensor(np.ones(size, np.float32), dtype)
    return build("Expand", build.tensor(1.0, dtype), build("Shape", like, start=-1))
