"""Exact addition of small integer products on this processor, which exports in int8-dynamic need."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from gralora_fx.errors import GraloraError, ServingError, option
from gralora_fx.run.sessions.session import CPU, Runtime, quiet_options

_WIDTH = 64


def check_integer_sums(runtime: Runtime, error: type[GraloraError] = ServingError) -> None:
    """Raise if the CPU is used and cannot add products of int8 weights and rounded activations exactly.

    x86 processors without VNNI (Intel's before 2019, AMD's before Zen 4) add two such products in 16 bits, which
    saturates silently.
    """
    providers = [name for name, _ in runtime.providers]
    if providers[:1] in ([], [CPU]) and not runtime.devices and not adds_exactly():
        raise error(
            "the export multiplies int8 weights by activations of 8 bits, whose sums this processor does not add "
            f"exactly (it has no VNNI): take another processor, or export with {option(quantize='int8')}"
        )


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
    session = onnxruntime.InferenceSession(model.SerializeToString(), quiet_options(1), providers=[CPU])
    (sums,) = session.run(None, {"a": np.full((2, _WIDTH), 255, np.uint8)})
    return bool((sums == 255 * 127 * _WIDTH).all())
