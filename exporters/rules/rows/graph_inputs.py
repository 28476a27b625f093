"""Inputs of a graph: in float32, whatever it computes in; and those that a caller may leave out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.format.adapter_inputs import is_adapter_tensor
from gralora_fx.format.export_directory import ATTENTION_SEQLENS, LOGITS_INDICES


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


def optional_verifying_inputs(model: ir.Model) -> PassResult[ir.Model]:
    """Give the inputs of a rows' graph with which proposed tokens are verified a value that stands for none.

    Before: `graph(input_ids, query_seqlens, past_seqlens, attention_seqlens, logits_indices, ...)`
    After:  the same with `attention_seqlens = [0]` and `logits_indices = []` where they are not given

    So a program that knows the first three inputs gets the logits after the last token of each row.
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    defaults: dict[str, NDArray[Any]] = {
        ATTENTION_SEQLENS: np.zeros(1, np.int32),
        LOGITS_INDICES: np.zeros(0, np.int64),
    }
    given = {name: array for name, array in defaults.items() if name in inputs}
    for name, array in given.items():
        give_default(model.graph, inputs[name], array)
    return PassResult(len(given))


def give_default(graph: ir.Graph, value: ir.Value, array: NDArray[Any]) -> None:
    """Make an input an initializer too, which a caller may override."""
    assert value.dtype is not None
    value.const_value = ir.tensor(array, dtype=value.dtype, name=str(value.name))
    graph.initializers[str(value.name)] = value
