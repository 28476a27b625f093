"""Inputs of a graph in float32, whatever it computes in."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.format.adapter_inputs import is_adapter_tensor


def float32_inputs(model: ir.Model) -> PassResult[ir.Model]:
    """Make every half-precision input float32 and cast it inside the model; cache and adapters keep their dtype.

    Before: `y = MatMul(input_values, w)`, `input_values: float16`
    After:  `y = MatMul(Cast(input_values, to=float16), w)`, `input_values: float32`
    """
    count = 0
    for value in model.graph.inputs:
        dtype = value.dtype
        keeps_dtype = str(value.name).startswith("past_key_values") or is_adapter_tensor(str(value.name))
        if dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) or keeps_dtype:
            continue
        cast = ir.node("Cast", [value], attributes={"to": dtype})
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        # a new one: others may share the old, which setting dtype would change
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.insert_before(model.graph[0], cast)
        count += 1
    return PassResult(count)
