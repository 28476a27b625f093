"""Products with columns, as an exported graph has them: found again by their nodes."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from gralora_fx.errors import ExportError

FACTORS = "_input_factors"  # how the name of an initializer of them ends


class QuantizedProduct(NamedTuple):
    """The nodes of a product of a quantized export.

    Attributes:
        nodes: From the largest value of a row to the product.
        input: The activations, float32 `[..., K]`, with their factors.
        weight: int8 `[K, N]`.
        scale: float32 `[N]`.
        output: float32 `[..., N]`.
    """

    nodes: tuple[ir.Node, ...]
    input: ir.Value
    weight: ir.Value
    scale: ir.Value
    output: ir.Value


def quantized_products(model: ir.Model) -> list[QuantizedProduct]:
    """The products with columns of a model, in order, those of branches too.

    Raises:
        ExportError: The nodes around one are not those that the export writes.
    """
    nodes = list(model.graph.all_nodes())
    if earlier := next((node for node in nodes if node.op_type == "MatMulInteger"), None):
        raise ExportError(
            f"the product {earlier.name or earlier.outputs[0].name} is of an earlier version's int8-dynamic export, "
            "which rounded a whole batch by its largest value; export the model again"
        )
    return [_product(node) for node in nodes if node.op_type == "MatMul" and columns_of(node) is not None]


def columns_of(node: ir.Node) -> ir.Node | None:
    """What dequantizes the int8 columns that a node multiplies by (see `ColumnProducts`); None for other nodes."""
    value = node.inputs[1] if node.op_type == "MatMul" else None
    weight = None if value is None else value.producer()
    values = None if weight is None or weight.op_type != "DequantizeLinear" else weight.inputs[0]
    return weight if values is not None and values.is_initializer() and values.dtype == ir.DataType.INT8 else None


def factors_of(node: ir.Node) -> ir.Value | None:
    """The factors `[K]` of what a product with columns reads; None where there are none."""
    scaling = _product(node).input.producer()
    factors = None if scaling is None or scaling.op_type != "Mul" else scaling.inputs[1]
    return factors if factors is not None and str(factors.name).endswith(FACTORS) else None


def _product(node: ir.Node) -> QuantizedProduct:
    weight, scaled = columns_of(node), node
    for kind in ("DequantizeLinear", "Concat", "QuantizeLinear", "Div"):
        producer = None if "block_size" in scaled.attributes else _producer(scaled, 0)
        scaled = producer if producer is not None and producer.op_type == kind else scaled
    is_rounded = scaled.op_type == "Div" or "block_size" in scaled.attributes
    result = _only_reader(node.outputs[0])
    if result is not None and result.op_type == "Split":
        added = _only_reader(result.outputs[0])
        result = None if added is None else _only_reader(added.outputs[0])
    if weight is None or not is_rounded or result is None or result.op_type != "Mul":
        raise ExportError(
            f"the product {node.name or node.outputs[0].name} is not one of an int8-dynamic export; export the model "
            "again"
        )
    source, (values, scale) = scaled.inputs[0], weight.inputs[:2]
    assert source is not None
    assert values is not None
    assert scale is not None
    return QuantizedProduct(_nodes_between(source, result), source, values, scale, result.outputs[0])


def _nodes_between(source: ir.Value, last: ir.Node) -> tuple[ir.Node, ...]:
    """What a node is computed by from a value on, in order, the node itself included."""
    nodes: dict[ir.Node, None] = {}
    for value in last.inputs:
        producer = None if value is None or value is source else value.producer()
        if producer is not None:
            nodes |= dict.fromkeys(_nodes_between(source, producer))
    return (*nodes, last)


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 else None


def _producer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None else value.producer()
