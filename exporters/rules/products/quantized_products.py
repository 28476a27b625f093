"""Quantized products in an exported graph: those with columns by their marks, and which blocks can be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import onnx_ir as ir

from gralora_fx.errors import ExportError, option
from gralora_fx.exporters.rules.builder import input_at

_T = TypeVar("_T")

MARK = "gralora_int8"  # key in the metadata of the nodes of products with columns: the node's part
FACTORS, STEP, WEIGHT, PRODUCT = "factors", "step", "weight", "product"  # before it, in it, its int8 columns, its last
INPUT_ORDER = "gralora_input_order"  # key in the metadata of the node that gives a product's inputs another order
EARLIER = (
    "it is not marked as this version marks products of int8-dynamic exports; export the model again with "
    f"{option(quantize='int8-dynamic')}"
)


class QuantizedProduct(NamedTuple):
    """The nodes of a product of a quantized export."""

    nodes: tuple[ir.Node, ...]  # from the largest value of a row to the product
    input: ir.Value  # the activations, float32 `[..., K]`, with their factors
    weight: ir.Value  # int8 `[K, N]`
    scale: ir.Value  # float32 `[N]`
    output: ir.Value  # float32 `[..., N]`


def quantized_products(model: ir.Model) -> list[QuantizedProduct]:
    """Return the products with columns of a model, in order, branches included."""
    nodes = list(model.graph.all_nodes())
    if earlier := next((node for node in nodes if node.op_type == "MatMulInteger" or is_unmarked(node)), None):
        raise _not_marked(earlier)
    return [_product(node) for node in nodes if node.metadata_props.get(MARK) == PRODUCT]


def is_unmarked(node: ir.Node) -> bool:
    """Return whether a node dequantizes int8 columns as a product's node does, but has no mark."""
    values = node.inputs[0] if node.op_type == "DequantizeLinear" and len(node.inputs) == 2 else None
    is_int8 = values is not None and values.is_initializer() and values.dtype == ir.DataType.INT8
    return is_int8 and MARK not in node.metadata_props


def factors_of(weight: ir.Node) -> ir.Value | None:
    """Return the factors `[K]` on the input of the columns that a node dequantizes; None if there are none."""
    product = next(use.node for use in weight.outputs[0].uses())
    scaling = None if is_unmarked(weight) else _input(_nodes_to(product)).producer()
    return scaling.inputs[1] if scaling is not None and scaling.metadata_props.get(MARK) == FACTORS else None


def _product(last: ir.Node) -> QuantizedProduct:
    nodes = _nodes_to(last)
    weight = _only([node for node in nodes if node.metadata_props.get(MARK) == WEIGHT], last)
    values, scale = weight.inputs
    assert values is not None
    assert scale is not None
    return QuantizedProduct(nodes, _input(nodes), values, scale, last.outputs[0])


def _nodes_to(last: ir.Node) -> tuple[ir.Node, ...]:
    """Return the nodes within a product that a node's value depends on, in order, itself included."""
    nodes: dict[ir.Node, None] = {}
    for value in last.inputs:
        producer = None if value is None else value.producer()
        is_part = producer is not None and producer.metadata_props.get(MARK) in (STEP, WEIGHT)
        if producer is not None and (is_part or producer.op_type == "Constant"):
            nodes |= dict.fromkeys(_nodes_to(producer))
    return (*nodes, last)


def _input(nodes: Sequence[ir.Node]) -> ir.Value:
    """Return the one value that a product's nodes read from outside."""
    read = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
    others = [value for value in read if value.is_graph_input() or not value.is_initializer()]
    return _only([value for value in others if value.producer() not in nodes], nodes[-1])


def _only(found: Sequence[_T], last: ir.Node) -> _T:
    if len(found) != 1:
        raise _not_marked(last)
    return found[0]


def _not_marked(node: ir.Node) -> ExportError:
    return ExportError(f"the product by {node.outputs[0].name}: {EARLIER}")


# -- products with blocks ----------------------------------------------------------------------------------------------


def why_not_blocks(node: ir.Node) -> str:
    """Return why the blocks of a `MatMulNBits` cannot be quantized again; empty if they can."""
    if input_at(node, 4) is not None:
        return "its blocks have a group index, which is not re-quantized"
    bits = node.attributes.get("bits")
    if bits is not None and bits.as_int() not in (4, 8):
        return f"its blocks have {bits.as_int()} bits; 4 and 8 are re-quantized"
    scales, zero_points = stored_scales(input_at(node, 2)), input_at(node, 3)
    if scales is None or not scales.is_initializer():
        return "its scales are not an initializer"
    if zero_points is None:
        return ""
    if not zero_points.is_initializer():
        return "its zero points are not an initializer"
    assert zero_points.const_value is not None
    is_packed = zero_points.const_value.dtype == ir.DataType.UINT8
    return "" if is_packed else "its zero points are not packed integers, and only those are re-quantized"


def input_order(node: ir.Node) -> ir.Value | None:
    """Return the order of the inputs of which a product's blocks are made; None for their own."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    return producer.inputs[1] if producer is not None and INPUT_ORDER in producer.metadata_props else None


def stored_scales(value: ir.Value | None) -> ir.Value | None:
    """Return the initializer of scales, looking behind the cast that widens them if they are stored in 16 bits."""
    cast = None if value is None else value.producer()
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    halves = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
    is_stored = source is not None and source.is_initializer() and source.dtype in halves
    return source if is_stored else value


def why_not_apart(products: Sequence[ir.Node], is_looked_up: bool) -> str:
    """Return why blocks cannot change without those of another matrix; empty if they can."""
    nodes = {id(node) for node in products}
    for index, name in ((2, "scales"), (3, "zero points")):
        part, *rest = (input_at(node, index) for node in products)
        users = set() if part is None else {id(use.node) for use in part.uses()}
        if any(other is not part for other in rest) or (
            users - nodes and not is_looked_up
        ):  # else the blocks are copied
            return f"its {name} are not its own alone"
    return ""
