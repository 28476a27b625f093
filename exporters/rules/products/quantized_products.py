"""Products with columns in an exported graph: the marks on their nodes, and the products found by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import onnx_ir as ir

from gralora_fx.errors import ExportError, option

_T = TypeVar("_T")

MARK = "gralora_int8"  # key in the metadata of the nodes of products with columns: the node's part
FACTORS, STEP, WEIGHT, PRODUCT = "factors", "step", "weight", "product"  # before it, in it, its int8 columns, its last
EARLIER = (
    "it is not marked as this version marks products of int8-dynamic exports; export the model again with "
    f"{option(quantize='int8-dynamic')}"
)


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
    """Return the products with columns of a model, in order, those of branches too."""
    nodes = list(model.graph.all_nodes())
    if earlier := next((node for node in nodes if node.op_type == "MatMulInteger" or is_unmarked(node)), None):
        raise _not_marked(earlier)
    return [_product(node) for node in nodes if node.metadata_props.get(MARK) == PRODUCT]


def is_unmarked(node: ir.Node) -> bool:
    """Return whether a node dequantizes int8 columns as one of a product does, without its mark."""
    values = node.inputs[0] if node.op_type == "DequantizeLinear" and len(node.inputs) == 2 else None
    is_int8 = values is not None and values.is_initializer() and values.dtype == ir.DataType.INT8
    return is_int8 and MARK not in node.metadata_props


def factors_of(weight: ir.Node) -> ir.Value | None:
    """Return the factors `[K]` of what is multiplied by the columns that a node dequantizes; None if there are none."""
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
    """Return what a node of a product is computed by within the product, in order, the node itself included."""
    nodes: dict[ir.Node, None] = {}
    for value in last.inputs:
        producer = None if value is None else value.producer()
        is_part = producer is not None and producer.metadata_props.get(MARK) in (STEP, WEIGHT)
        if producer is not None and (is_part or producer.op_type == "Constant"):
            nodes |= dict.fromkeys(_nodes_to(producer))
    return (*nodes, last)


def _input(nodes: Sequence[ir.Node]) -> ir.Value:
    """Return the one value that nodes of a product read of others."""
    read = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
    others = [value for value in read if value.is_graph_input() or not value.is_initializer()]
    return _only([value for value in others if value.producer() not in nodes], nodes[-1])


def _only(found: Sequence[_T], last: ir.Node) -> _T:
    if len(found) != 1:
        raise _not_marked(last)
    return found[0]


def _not_marked(node: ir.Node) -> ExportError:
    return ExportError(f"the product by {node.outputs[0].name}: {EARLIER}")
