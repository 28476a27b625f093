"""A copy of an export that computes in float32, with the values that its weights were rounded to."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import onnx_ir as ir

from gralora_fx.base.features import marks, parts
from gralora_fx.exporters.artifact.save import save_models
from gralora_fx.exporters.rules.builder import add_initializer, replace_value
from gralora_fx.exporters.rules.products.constant_matrices import drop_unread
from gralora_fx.exporters.rules.products.quantized_products import QuantizedProduct, quantized_products
from gralora_fx.exporters.translation.weights import LazyTensor, derived
from gralora_fx.run.sessions.session import check_external_data

_IN_FLOAT32 = 1  # the accuracy level


def write_float32_copy(directory: Path, target: Path) -> None:
    """Write a copy of an export that computes in float32 instead of bfloat16 or int8, activations not rounded.

    The weights keep the values that they were rounded to. The CPU provider has no bfloat16 kernel for multiplications,
    attention or elementwise operators; and what a quantized operator loses by rounding activations would hide what is
    wrong with the weights. The copy tells whether the graph and the weights are right.
    """
    target.mkdir(parents=True, exist_ok=True)
    models: dict[str, ir.Model] = {}
    stored: dict[Hashable, ir.ExternalTensor] = {}  # tensors of several models that are stored once
    for path in sorted(directory.glob("*.onnx")):
        check_external_data(path)
        model = models[path.stem] = ir.load(path)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = stored.setdefault((tensor.path, tensor.offset, tensor.nbytes), tensor)
        _in_float32(model)
    save_models(models, target, target, shared=True)


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
    signs = marks({key for node in model.graph.all_nodes() for key in node.metadata_props})
    for in_floats in parts("float weights", signs) if signs else ():
        in_floats(model)
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

    Before: `y = MatMul(q, DequantizeLinear(w, w_scale)) * s`, with `q` the rounded `x / s` (see `ColumnProducts`)
    After:  `y = MatMul(x, w * w_scale)`
    """
    last = product.nodes[-1]
    weight, scale = product.weight.const_value, product.scale.const_value
    assert weight is not None
    assert scale is not None
    name = f"{product.weight.name}_float32"
    if name not in graph.initializers:
        shape = ir.Shape(weight.shape.numpy())

        def values() -> LazyTensor:
            return LazyTensor(name, ir.DataType.FLOAT, shape, lambda: ir.tensor(weight.numpy() * scale.numpy()))

        add_initializer(graph, derived([weight, scale], name, values))
    branch = last.graph
    assert isinstance(branch, ir.Graph)
    product_node = ir.node("MatMul", [product.input, graph.initializers[name]])
    branch.insert_before(last, product_node)
    replace_value(product_node.outputs[0], product.output)
    for node in reversed(product.nodes):
        if not any(value.uses() for value in node.outputs):  # what rounds is read by other products too
            branch.remove(node, safe=True)
    drop_unread(graph, [str(product.weight.name), str(product.scale.name)])


def _values(model: ir.Model) -> list[ir.Value]:
    outputs = [value for node in model.graph.all_nodes() for value in node.outputs]
    return [*model.graph.inputs, *model.graph.initializers.values(), *outputs]


def _as_float32(tensor: ir.TensorProtocol) -> LazyTensor:
    def cast() -> LazyTensor:
        shape, name = ir.Shape(tensor.shape.numpy()), tensor.name or ""
        return LazyTensor(name, ir.DataType.FLOAT, shape, lambda: ir.tensor(tensor.numpy().astype("float32")))

    return derived([tensor], "float32", cast)
