"""A float32 copy of an export, which ONNX Runtime's CPU provider can run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gralora_fx.exporters.artifact.staging import require_space
from gralora_fx.exporters.onnx_passes.builder import add_initializer, replace_value
from gralora_fx.exporters.onnx_passes.constant_matrices import drop_unread
from gralora_fx.exporters.onnx_passes.quantize_dynamic import QuantizedProduct, quantized_products
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
    """Write a copy of an export that computes in float32 instead of bfloat16 or int8, activations not rounded.

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
    for product in quantized_products(model):
        _multiply_in_float32(model.graph, product)
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _IN_FLOAT32)
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "dtype") and attribute.value == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _as_float32(attribute.as_tensor()))


def _multiply_in_float32(graph: ir.Graph, product: QuantizedProduct) -> None:
    """Multiply by what int8 weights stand for.

    Before: `y = Cast(MatMulInteger(q, w, z)) * (s * w_scale)`, with `q, s, z = DynamicQuantizeLinear(x)`
    After:  `y = MatMul(x, w * w_scale)`
    """
    rounding, *nodes = product.nodes
    weight, scale = product.weight.const_value, product.scale.const_value
    assert weight is not None
    assert scale is not None
    name = f"{product.weight.name}_float32"
    if name not in graph.initializers:
        shape = ir.Shape(weight.shape.numpy())
        values = LazyTensor(name, ir.DataType.FLOAT, shape, lambda: ir.tensor(weight.numpy() * scale.numpy()))
        add_initializer(graph, values)
    branch = nodes[0].graph
    assert isinstance(branch, ir.Graph)
    product_node = ir.node("MatMul", [product.input, graph.initializers[name]])
    branch.insert_before(nodes[-1], product_node)
    replace_value(product_node.outputs[0], product.output)
    branch.remove(nodes, safe=True)
    if not any(value.uses() for value in rounding.outputs):
        branch.remove(rounding, safe=True)
    drop_unread(graph, [str(product.weight.name), str(product.scale.name)])


def _values(model: ir.Model) -> list[ir.Value]:
    outputs = [value for node in model.graph.all_nodes() for value in node.outputs]
    return [*model.graph.inputs, *model.graph.initializers.values(), *outputs]


def _as_float32(tensor: ir.TensorProtocol) -> LazyTensor:
    shape = ir.Shape(tensor.shape.numpy())
    return LazyTensor(tensor.name or "", ir.DataType.FLOAT, shape, lambda: ir.tensor(tensor.numpy().astype("float32")))
