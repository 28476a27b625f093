"""Experts as they are opened on the CPU: a product for each of a layer's experts, whose matrices are packed once.

ONNX Runtime's `MoE` packs the matrices of an expert in every call, which takes a third of a prompt's time where experts
are wide, and multiplies an expert's only token in another order than several, so that in float32 the last digits of an
answer depend on what is read next to it. Its `Gemm` packs a constant matrix when the session is made, and computes a
row in one way. An export keeps the operator, which is one node for all experts and what other providers compute fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gralora_fx.core.operators.expert_gate import GATE_NOTE

MOST_BYTES = 8 << 30  # of experts in a model; larger ones stay in the file, of which ONNX Runtime maps what is read
_FLOAT = 4  # bytes
_STEP = 1e10  # a factor in a sigmoid from which it is a step, which ONNX Runtime's `Sigmoid` bounds too early
_INPUTS = ("x", "scores", "up", "up_bias", "down", "down_bias")
_END = 2**31


def open_experts(model: onnx.ModelProto) -> bool:
    """Compute experts in float32 by products, in place.

    Before: `y = MoE(x, OneHot(index), up, up_bias, down, down_bias, k=1)`
    After:  `order = TopK(index, largest=0); parts = Split(x[order], <tokens of each expert>)`
            `h = act(Concat(Gemm(parts[i], up[i][::2])...), Concat(Gemm(parts[i], up[i][1::2])...))`
            `y = Concat(Gemm(Split(h)[i], down[i])...)[<order, inverted>]`

    Args:
        model: A graph; its weights are not read.

    Returns:
        Whether it was changed. Left as they are: experts of another dtype or of another exporter, and all of a model
        where they take more than `MOST_BYTES`.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    stacks = {tensor.name: tensor for tensor in graph.initializer}
    layers = {node.output[0]: node for node in graph.node if _is_replaced(node, makers, stacks)}
    names = {name for node in layers.values() for name in node.input[2:] if name}
    if not layers or sum(_FLOAT * math.prod(stacks[name].dims) for name in names) > MOST_BYTES:
        return False
    parts = {name: list(_entries(stacks[name])) for name in names}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes += _Layer(node, makers, parts).nodes if node.output[0] in layers else [node]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in names or tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *(part for tensors in parts.values() for part in tensors)])
    return True


def _is_replaced(node: onnx.NodeProto, makers: dict[str, Any], stacks: dict[str, TensorProto]) -> bool:
    if node.op_type != "MoE" or not any(note.key == GATE_NOTE for note in node.metadata_props):
        return False
    weights = [stacks.get(name) for name in node.input[2:] if name]
    is_float = all(weight is not None and weight.data_type == TensorProto.FLOAT for weight in weights)
    scores = makers.get(node.input[1])
    return is_float and _attributes(node).get("k") == 1 and scores is not None and scores.op_type == "OneHot"


def _entries(stack: TensorProto) -> Iterator[TensorProto]:
    """The entries of a stack, each a tensor of its own over the same bytes."""
    size = _FLOAT * math.prod(stack.dims[1:])
    own = {entry.key: entry.value for entry in stack.external_data}
    for index in range(stack.dims[0]):
        begin = index * size
        part = TensorProto(name=f"{stack.name}.{index}", data_type=stack.data_type, dims=stack.dims[1:])
        if stack.data_location == TensorProto.EXTERNAL:
            part.data_location = TensorProto.EXTERNAL
            place = {"location": own["location"], "offset": int(own.get("offset", 0)) + begin, "length": size}
            for key, value in place.items():
                part.external_data.add(key=key, value=str(value))
        else:
            part.raw_data = stack.raw_data[begin : begin + size]
        yield part


class _Layer:
    """The nodes of one layer.

    Attributes:
        nodes: In their order.
    """

    def __init__(self, node: onnx.NodeProto, makers: dict[str, Any], parts: dict[str, list[TensorProto]]) -> None:
        """Make them in the place of an operator."""
        self.nodes: list[onnx.NodeProto] = []
        self._name, (result,) = node.output[0], node.output
        operands = dict(zip(_INPUTS, [*node.input, *[""] * len(_INPUTS)], strict=False))
        weights = {name: [part.name for part in parts.get(operands[name], ())] for name in _INPUTS[2:]}
        index, is_noted = makers[node.input[1]].input[0], {prop.key: prop.value for prop in node.metadata_props}
        order = self._order(index)
        counts = self._one("Cast", self._one("ReduceSum", operands["scores"], self._ints(0), keepdims=0), to=7)
        tokens = self._split(self._one("Gather", operands["x"], order), counts, len(weights["down"]))
        attributes = _attributes(node)
        if attributes["activation_type"] == b"swiglu":
            is_twice = is_noted.get(GATE_NOTE, "").startswith("relu2 ")
            halves = [self._products(tokens, weights["up"], weights["up_bias"], half) for half in range(2 - is_twice)]
            inner = self._gated(halves[0], halves[-1], attributes)
        else:
            inner = self._activated(self._products(tokens, weights["up"], weights["up_bias"]), attributes)
        each = self._split(inner, counts, len(tokens))
        outer = self._products(each, weights["down"], weights["down_bias"])
        self._node("Gather", [outer, self._order(order)], [result])

    def _products(
        self, rows: Sequence[str], weights: Sequence[str], biases: Sequence[str], half: int | None = None
    ) -> str:
        """The products of each expert's rows, one below the other; of a half, with every second row of its matrix."""
        outputs = []
        for index, of_expert in enumerate(rows):
            operands = [weights[index], *biases[index : index + 1]]
            if half is not None:
                limits = [self._ints(number) for number in (half, _END, 0, 2)]
                operands = [self._one("Slice", operand, *limits) for operand in operands]
            outputs.append(self._one("Gemm", of_expert, *operands, transB=1))
        return self._one("Concat", *outputs, axis=0)

    def _gated(self, gate: str, linear: str, attributes: dict[str, Any]) -> str:
        """`swiglu`, as the operator's schema has it."""
        alpha, beta, limit = (
            attributes.get(name, 0) for name in ("activation_alpha", "activation_beta", "swiglu_limit")
        )
        if limit:
            high = self._constant(np.float32(limit))
            gate, linear = (
                self._one("Min", gate, high),
                self._one("Clip", linear, self._constant(np.float32(-limit)), high),
            )
        if beta:
            linear = self._one("Add", linear, self._constant(np.float32(beta)))
        if alpha >= _STEP:
            return self._one("Mul", self._one("Relu", gate), linear)
        scaled = gate if alpha == 1 else self._one("Mul", gate, self._constant(np.float32(alpha)))
        return self._one("Mul", self._one("Mul", gate, self._one("Sigmoid", scaled)), linear)

    def _activated(self, x: str, attributes: dict[str, Any]) -> str:
        kind = attributes["activation_type"].decode()
        if kind == "silu":
            return self._one("Mul", x, self._one("Sigmoid", x))
        if kind == "gelu":
            return self._one("Gelu", x, approximate="tanh")
        return x if kind == "identity" else self._one("Relu", x)

    def _order(self, keys: str) -> str:
        """The indices that sort integers, equal ones as they come."""
        return self._node("TopK", [keys, self._one("Shape", keys)], self._names(2), largest=0)[1]

    def _split(self, x: str, counts: str, number: int) -> Sequence[str]:
        return self._node("Split", [x, counts], self._names(number))

    def _ints(self, value: int) -> str:
        return self._constant(np.array([value], np.int64))

    def _constant(self, value: Any) -> str:
        return self._node("Constant", [], self._names(1), value=numpy_helper.from_array(np.asarray(value)))[0]

    def _one(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        return self._node(op_type, inputs, self._names(1), **attributes)[0]

    def _names(self, number: int) -> list[str]:
        return [f"{self._name}.products.{len(self.nodes)}.{index}" for index in range(number)]

    def _node(self, op_type: str, inputs: Iterable[str], outputs: list[str], **attributes: Any) -> Sequence[str]:
        self.nodes.append(helper.make_node(op_type, list(inputs), outputs, **attributes))
        return outputs


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
