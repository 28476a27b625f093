"""A float32 copy of an export, which ONNX Runtime's CPU provider can run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gralora_fx.exporters.artifact.staging import require_space
from gralora_fx.exporters.translation.weights import LazyTensor
from gralora_fx.runtime.manifest import Manifest
from gralora_fx.runtime.session import CPU, Runtime, check_external_data, open_session

_IN_FLOAT32 = 1  # the accuracy level


def open_comparable(directory: Path, manifest: Manifest, runtime: Runtime | None = None) -> tuple[Any, str]:
    """A session over an export, or over its float32 copy where that is needed, and the precision of its model.

    Args:
        directory: An export directory.
        manifest: Its manifest.
        runtime: How to run it; None for the CPU. Only a bfloat16 export that other providers run needs no copy.

    Raises:
        ExportError: ONNX Runtime cannot load it, or the disk has no room for the copy.
    """
    precision, is_on_cpu = manifest.precision, runtime is None or runtime.providers[0][0] == CPU
    if manifest.quantization is None and (precision != "bf16" or not is_on_cpu):
        return open_session(directory, runtime), precision
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.absolute().parent) as copy:
        write_float32_copy(directory, Path(copy))
        return open_session(copy, runtime), "fp16" if precision == "fp16" else "fp32"


def write_float32_copy(directory: Path, target: Path) -> None:
    """Write a copy of an export that computes in float32 instead of bfloat16 or int8.

    The weights keep the values that they were rounded to. The CPU provider has no bfloat16 kernel for multiplications,
    attention or elementwise operators; and what a quantized operator loses by rounding activations would hide what is
    wrong with the weights. The copy tells whether the graph and the weights are right.

    Args:
        directory: An export directory.
        target: Directory to write its models and their data to.

    Raises:
        ExportError: Weights are outside the directory, or the disk has no room.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(directory.glob("*.onnx")):
        check_external_data(path)
        model = ir.load(path)
        _in_float32(model)
        weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
        require_space(target, sum(tensor.nbytes for tensor in weights))
        ir.save(model, target / path.name, external_data=f"{path.name}_data", size_threshold_bytes=1024)


def _in_float32(model: ir.Model) -> None:
    for value in _values(model):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
            value.const_value = _as_float32(tensor)
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _IN_FLOAT32)
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "dtype") and attribute.value == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _as_float32(attribute.as_tensor()))


def _values(model: ir.Model) -> list[ir.Value]:
    outputs = [value for node in model.graph.all_nodes() for value in node.outputs]
    return [*model.graph.inputs, *model.graph.initializers.values(), *outputs]


def _as_float32(tensor: ir.TensorProtocol) -> LazyTensor:
    shape = ir.Shape(tensor.shape.numpy())
    return LazyTensor(tensor.name or "", ir.DataType.FLOAT, shape, lambda: ir.tensor(tensor.numpy().astype("float32")))
