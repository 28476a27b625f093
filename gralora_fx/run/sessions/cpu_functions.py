"""Functions for the CPU in an export: calls to them replace the nodes that name them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper

from gralora_fx.format.export_directory import CPU_FUNCTION


def call_cpu_functions(model: onnx.ModelProto) -> bool:
    """Call the functions that nodes of a graph name, in place.

    Before: `y = MoE(x, scores, up, "", down)`, with `up [2, N, K]`, whose metadata names `gralora.Layer_0`
    After:  `y = gralora.Layer_0(x, scores, up.0, up.1, down.0, down.1)`, with `up.0 [N, K]`

    Each entry of an initializer becomes a constant over the same bytes: ONNX Runtime prepacks constant matrices of
    products once, when it creates the session.
    """
    graph = model.graph
    marked = [(node, note.value) for node in graph.node for note in node.metadata_props if note.key == CPU_FUNCTION]
    stacks = {tensor.name: tensor for tensor in graph.initializer}
    entries: dict[str, list[TensorProto]] = {}
    for node, function in marked:
        operands: list[str] = []
        for name in filter(None, node.input):
            if name in stacks and name not in entries:
                entries[name] = list(_entries(stacks[name]))
            operands += [entry.name for entry in entries[name]] if name in stacks else [name]
        node.domain, _, node.op_type = function.rpartition(".")
        del node.input[:], node.attribute[:]
        node.input.extend(operands)
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in entries or tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *(entry for tensors in entries.values() for entry in tensors)])
    return bool(marked)


def _entries(stack: TensorProto) -> Iterator[TensorProto]:
    """Yield the entries of a tensor along its first axis."""
    size = math.prod(stack.dims[1:]) * helper.tensor_dtype_to_np_dtype(stack.data_type).itemsize
    place = {entry.key: entry.value for entry in stack.external_data}
    for index in range(stack.dims[0]):
        begin = index * size
        entry = TensorProto(name=f"{stack.name}.{index}", data_type=stack.data_type, dims=stack.dims[1:])
        if stack.data_location == TensorProto.EXTERNAL:
            entry.data_location = TensorProto.EXTERNAL
            offset = int(place.get("offset", 0)) + begin
            for key, value in {**place, "offset": offset, "length": size}.items():
                entry.external_data.add(key=key, value=str(value))
        else:
            entry.raw_data = stack.raw_data[begin : begin + size]
        yield entry
