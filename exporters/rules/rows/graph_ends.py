"""The ends of a graph: inputs in float32, inputs that may be left out, and logits of the last position alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.errors import ExportError, option
from gralora_fx.exporters.rules.builder import Builder
from gralora_fx.exporters.rules.onnx_pipeline import APART_ADDITIONS
from gralora_fx.exporters.translation.matching import END
from gralora_fx.format.adapter_inputs import is_adapter_tensor
from gralora_fx.format.export_directory import ATTENTION_SEQLENS, LOGITS_INDICES, TEXT_SEQLENS


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


def optional_inputs_of_rows(model: ir.Model) -> PassResult[ir.Model]:
    """Give inputs that a program need not know a default that means none, so that callers may leave them out.

    Before: `graph(input_ids, query_seqlens, past_seqlens, attention_seqlens, logits_indices, text_seqlens, ...)`
    After:  the same with `attention_seqlens = [0]`, `logits_indices = []` and `text_seqlens = [0]` as defaults, so that
            a caller who knows only the first three inputs gets the logits after each row's last token
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    defaults: dict[str, NDArray[Any]] = {
        ATTENTION_SEQLENS: np.zeros(1, np.int32),
        LOGITS_INDICES: np.zeros(0, np.int64),
        TEXT_SEQLENS: np.zeros(1, np.int32),
    }
    given = {name: array for name, array in defaults.items() if name in inputs}
    for name, array in given.items():
        give_default(model.graph, inputs[name], array)
    return PassResult(len(given))


def give_default(graph: ir.Graph, value: ir.Value, array: NDArray[Any]) -> None:
    """Give an input a default: an initializer of its name, which a caller may override."""
    assert value.dtype is not None
    value.const_value = ir.tensor(array, dtype=value.dtype, name=str(value.name))
    graph.initializers[str(value.name)] = value


# operators that may follow the last projection, such as a soft cap or a factor
_ELEMENTWISE = {"Mul", "Div", "Add", "Tanh", "Cast", "Identity", "Clip"}


@contract(needs={APART_ADDITIONS})
def keep_last_position(model: ir.Model) -> PassResult[ir.Model]:
    """Compute logits only for the last position of each row that is not padding: all that a prompt needs."""
    head = head_of(model)
    hidden = head.hidden
    ids, mask = (_input(model, name) for name in ("input_ids", "attention_mask"))
    build = Builder(model.graph)
    length = build("Shape", ids, start=1, end=2)
    window = build("Slice", mask, build("Neg", length), [END], [1])  # the mask of new positions
    last = build("ArgMax", window, axis=1, keepdims=1, select_last_index=1)  # [batch, 1]
    cut = build("GatherND", hidden, build("Unsqueeze", last, [2]), batch_dims=1)  # [batch, 1, size]
    if hidden.shape is not None:
        cut.shape = ir.Shape([hidden.shape[0], 1, *hidden.shape[2:]])
    cut.type = hidden.type
    head.read(build, cut)
    return PassResult(1)


@dataclass(frozen=True)
class Head:
    """The projection that makes logits of hidden states."""

    hidden: ir.Value  # `[batch, length, size]`
    node: ir.Node  # the projection that reads them
    chain: tuple[ir.Value, ...]  # its output and the elementwise results after it, up to the logits

    def read(self, build: Builder, positions: ir.Value) -> None:
        """Let the head read `positions [batch, 1, size]`, computed by a builder's nodes, instead of all."""
        build.insert_before(self.node)
        self.node.replace_input_with(0, positions)
        for member in self.chain:
            if member.shape is not None and len(member.shape) == 3 and positions.shape is not None:
                member.shape = ir.Shape([*positions.shape[:2], member.shape[2]])


def head_of(model: ir.Model) -> Head:
    """Return the projection that leads to a decoder's logits, its first output."""
    logits = model.graph.outputs[0]
    value, chain = logits, [logits]
    node = value.producer()
    while node is not None and node.op_type in _ELEMENTWISE:
        varying = [v for v in node.inputs if v is not None and v.producer() is not None and v.const_value is None]
        if len(varying) != 1:
            varying = [v for v in varying if v.shape is not None and len(v.shape) == 3]
        if len(varying) != 1:
            break
        value, node = varying[0], varying[0].producer()
        chain.append(value)
    if node is None or node.op_type not in ("MatMul", "Gemm") or node.inputs[0] is None:
        raise ExportError(
            "no projection leads to the logits, so those of the last position cannot be computed alone; take "
            f"{option(logits='all')}"
        )
    return Head(node.inputs[0], node, tuple(chain))


def _input(model: ir.Model, name: str) -> ir.Value:
    match = next((value for value in model.graph.inputs if value.name == name), None)
    if match is None:
        raise ExportError(
            f"the trace takes no {name}, so logits of the last position cannot be computed alone; take "
            f"{option(logits='all')}"
        )
    return match
