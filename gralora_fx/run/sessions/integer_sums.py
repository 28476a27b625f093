"""Exact sums of 8-bit products on every processor, which int8-dynamic exports need."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

if TYPE_CHECKING:
    import onnx

_WIDTH = 64
_OFFSET = 128  # from int8 to uint8
_COLUMNS = {"axis": 1}  # attributes of a node that reads weights with a scale for each column
_SUFFIX, _FLIP = ".uint8", "int8_sums.flip"


def offset_weights(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> bool:
    """Let products among a model's nodes read int8 weights as uint8, in place; return whether there were any.

    Before: `y = MatMul(x, DequantizeLinear(w, scale, axis=1))`, `w [K, N]` int8, `scale [N]`
    After:  `y = MatMul(x, DequantizeLinear(BitwiseXor(u, 128), scale, z, axis=1))`, with the bytes of `w` as `u`, which
            is uint8, and `z [N]` of 128: the same values

    x86 processors without VNNI (Intel's before 2019, AMD's before Zen 4) add two products of uint8 and int8 in 16 bits,
    which saturates silently. ONNX Runtime sums products of uint8 and uint8 exactly on every processor. It computes the
    new weights once, when the session is created; they take memory beside the file's.
    """
    weights = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2
    }
    multiplied = {node.input[1] for node in nodes if node.op_type == "MatMul"}
    by_column = [node for node in nodes if node.op_type == "DequantizeLinear" and _numbers(node) == _COLUMNS]
    read = [
        node for node in by_column if len(node.input) == 2 and node.input[0] in weights and node.output[0] in multiplied
    ]
    for name in dict.fromkeys(node.input[0] for node in read):
        model.graph.initializer.append(_as_uint8(weights[name]))
        flipped = helper.make_node("BitwiseXor", [f"{name}{_SUFFIX}.bytes", _FLIP], [f"{name}{_SUFFIX}"])
        model.graph.node.insert(0, flipped)
    for width in sorted({weights[node.input[0]].dims[1] for node in read}):
        model.graph.initializer.append(_filled(f"int8_sums.zeros_{width}", [width]))
    for node in read:
        width = weights[node.input[0]].dims[1]
        node.input[:] = [f"{node.input[0]}{_SUFFIX}", node.input[1], f"int8_sums.zeros_{width}"]
    if read:
        model.graph.initializer.append(_filled(_FLIP, []))
    return bool(read)


def _numbers(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _as_uint8(weight: onnx.TensorProto) -> onnx.TensorProto:
    """Return a constant of the same bytes, which may be in a file."""
    copied = TensorProto()
    copied.CopyFrom(weight)
    copied.name, copied.data_type = f"{weight.name}{_SUFFIX}.bytes", TensorProto.UINT8
    return copied


def _filled(name: str, shape: list[int]) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.UINT8, shape, np.full(shape, _OFFSET, np.uint8).tobytes(), raw=True)


@functools.cache
def adds_exactly() -> bool:
    """Return whether ONNX Runtime adds the largest uint8 by int8 products exactly here, by running one product."""
    sides = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("a", TensorProto.UINT8, [2, _WIDTH]),
            ("b", TensorProto.INT8, [_WIDTH, _WIDTH]),
            ("y", TensorProto.INT32, [2, _WIDTH]),
        )
    ]
    weight = helper.make_tensor(
        "b", TensorProto.INT8, [_WIDTH, _WIDTH], np.full(_WIDTH * _WIDTH, 127, np.int8).tobytes(), raw=True
    )
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "sums", sides[:1], sides[2:], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"a": np.full((2, _WIDTH), 255, np.uint8)})
    return bool((sums == 255 * 127 * _WIDTH).all())
