"""Initializers of ONNX models: which are the weights that products multiply by, and which parameters they hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import onnx_ir as ir

from gralora_fx.exporters.rules.builder import MICROSOFT, attributes_of, input_at

Storage = Literal["float", "blocks", "columns"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_ONNX = ("", "ai.onnx")


class Reader(NamedTuple):
    """An input of a node."""

    node: ir.Node
    position: int

    @property
    def text(self) -> str:
        """The node's operator and name."""
        return f"{self.node.op_type} {self.node.name or self.node.outputs[0].name}"


@dataclass(frozen=True)
class ProductWeight:
    """A weight that products multiply by, of one or several linear layers."""

    # the initializer: floats `[in, out]` or `[out, in]`, blocks `[out, in/block, bytes]` of `MatMulNBits`, or int8
    # `[in, out]` of columns
    value: ir.Value
    storage: Storage  # which of these it is: `"float"`, `"blocks"` or `"columns"`
    transposed: bool  # whether it is stored `[in, out]`, not `[out, in]` as in PyTorch
    in_features: int  # width of the products' input
    out_features: int  # width of their output
    readers: tuple[Reader, ...]  # the node inputs through which products read it, also of a transpose or cast
    others: tuple[Reader, ...]  # other inputs that read it, such as a lookup's
    scales: ir.Value | None = None  # the scales of blocks `[out, in/block]` or of columns `[out]`; None for floats
    is_widened: bool = False  # whether scales are stored in fewer bits than the floats that they are cast to
    zero_points: ir.Value | None = None  # the packed zero points of blocks `[out, bytes]`; None if there are none
    block_size: int = 0  # values of a block; 0 for other storage
    bits: int = 0  # bits of a quantized value; 0 for floats
    # factors of the columns' input, `[in]`, by which the stored columns are divided; None if there are none
    factors: ir.Value | None = None
    # the order of the inputs of which blocks are made, int64 `[in]`; None for their own
    order: ir.Value | None = None
    problem: str = ""  # why nothing can be folded into it; empty if it can

    @property
    def name(self) -> str:
        """Name of the initializer."""
        return str(self.value.name)

    @property
    def parts(self) -> tuple[ir.Value, ...]:
        """Its initializers in the order of a product's inputs: values, then scales and zero points if present."""
        return (self.value, *(value for value in (self.scales, self.zero_points) if value is not None))


def product_weights(graph: ir.Graph) -> list[ProductWeight]:
    """Return the weights that a graph's products multiply by, branches included, in the order of first use."""
    return [weight for value in initializers(graph) if (weight := _product_weight(value)) is not None]


def initializer_names(graphs: Iterable[ir.Graph]) -> list[str]:
    """Return the names of the initializers of several graphs, each once."""
    return list(dict.fromkeys(str(value.name) for graph in graphs for value in initializers(graph)))


def initializers(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the initializers that nodes read and no caller overrides, branches included, each once."""
    seen: set[int] = set()
    for node in graph.all_nodes():
        for value in node.inputs:
            is_own = value is not None and value.is_initializer() and not value.is_graph_input()
            if value is not None and is_own and id(value) not in seen:
                seen.add(id(value))
                yield value


class _Product(NamedTuple):
    """A product's way of reading a weight."""

    storage: Storage
    transposed: bool
    problem: str = ""


def _product_weight(value: ir.Value) -> ProductWeight | None:
    products: list[tuple[Reader, _Product]] = []
    others: list[Reader] = []
    for use in value.uses():
        reader = Reader(use.node, use.idx)
        through = list(_products(reader, value))
        products += [(reader, product) for product in through if product is not None]
        others += [reader] if None in through else []
    if not products:
        return None
    kinds = {(product.storage, product.transposed) for _, product in products}
    problems = [product.problem for _, product in products if product.problem]
    mixed = [reader for reader, _ in products if reader in others]
    if len(kinds) > 1 or mixed:
        problems.append("products read it both as it is and transposed, or after an operator that others read too")
    readers = tuple(dict.fromkeys(reader for reader, _ in products))
    return _described(value, products[0][1], readers, tuple(dict.fromkeys(others)), problems)


def _described(
    value: ir.Value, product: _Product, readers: Sequence[Reader], others: Sequence[Reader], problems: Iterable[str]
) -> ProductWeight | None:
    """Return the weight with its widths; None for a tensor of a shape that no product has."""
    assert value.const_value is not None
    sizes = [int(size) for size in value.const_value.shape.numpy()]
    problem = next(iter(problems), "")
    if product.storage == "blocks":
        node = readers[0].node
        ints = {name: attribute.as_int() for name, attribute in node.attributes.items()}
        block_size, bits = ints.get("block_size", 0), ints.get("bits", 4)
        from gralora_fx.exporters.rules.products.quantized_products import input_order, stored_scales, why_not_apart

        problem = problem or why_not_apart([reader.node for reader in readers], bool(others))
        scales = stored_scales(node.inputs[2])
        return ProductWeight(
            value, "blocks", False, ints["K"], ints["N"], tuple(readers), tuple(others), scales,
            scales is not node.inputs[2], input_at(node, 3), block_size, bits, order=input_order(node),
            problem=problem,
        )  # fmt: skip
    if len(sizes) != 2:
        return None
    inputs, outputs = sizes if product.transposed else reversed(sizes)
    if product.storage == "columns":
        from gralora_fx.exporters.rules.products.quantized_products import factors_of

        factors = factors_of(readers[0].node)
        return ProductWeight(
            value, "columns", True, inputs, outputs, tuple(readers), tuple(others), input_at(readers[0].node, 1),
            bits=8, factors=factors, problem=problem,
        )  # fmt: skip
    return ProductWeight(
        value, "float", product.transposed, inputs, outputs, tuple(readers), tuple(others), problem=problem
    )


def _products(reader: Reader, value: ir.Value, *, transposed: bool = True) -> Iterator[_Product | None]:
    """Yield the products that an input leads to, through transposes and casts; None for each reader of another kind."""
    node, index = reader
    if node.op_type == "DequantizeLinear":
        from gralora_fx.exporters.rules.products.quantized_products import EARLIER, MARK, WEIGHT, is_unmarked

        if node.metadata_props.get(MARK) == WEIGHT or is_unmarked(node):
            yield _Product("columns", True, EARLIER if is_unmarked(node) else "") if index == 0 else None
            return
    if index == 0 and node.op_type in ("Transpose", "Cast", "Identity") and node.domain in _ONNX:
        order = node.attributes.get("perm")
        swaps = node.op_type == "Transpose" and (order is None or list(order.as_ints()) == [1, 0])
        uses = [Reader(use.node, use.idx) for use in node.outputs[0].uses()]
        if (node.op_type == "Transpose") == swaps and uses and not node.outputs[0].is_graph_output():
            for use in uses:
                yield from _products(use, value, transposed=transposed != swaps)
            return
    yield _product(node, index, value, transposed)


def _product(node: ir.Node, index: int, value: ir.Value, transposed: bool) -> _Product | None:
    """Return how a node multiplies by a matrix; None if it does something else with it."""
    flags = attributes_of(node)
    is_float = value.const_value is not None and value.const_value.dtype in _FLOATS
    if index != 1:
        return None
    if node.domain == MICROSOFT:
        if node.op_type == "MatMulNBits":
            from gralora_fx.exporters.rules.products.quantized_products import why_not_blocks

            return _Product("blocks", False, why_not_blocks(node))
        if node.op_type == "FusedMatMul" and is_float and not flags.get("transBatchB"):
            scaled = "it is scaled by alpha" if flags.get("alpha", 1.0) != 1.0 else ""
            return _Product("float", transposed != bool(flags.get("transB")), scaled)
        return _Product("float", transposed) if node.op_type == "Attention" and is_float else None
    if node.domain not in _ONNX:
        return None
    if node.op_type == "MatMul" and is_float:
        return _Product("float", transposed)
    if node.op_type == "Gemm" and is_float:
        scaled = "it is scaled by alpha" if flags.get("alpha", 1.0) != 1.0 else ""
        return _Product("float", transposed != bool(flags.get("transB")), scaled)
    return None


_QUANTIZED = re.compile(r"(_transposed)?_(Q[48](G\d+)?|quantized)$")
FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"  # names of the constants that onnxscript folded into one


def parameter_names(value: ir.Value) -> list[tuple[str, ...]]:
    """Return every reading of an initializer's name as parameters, side by side along its output features.

    `attn.q_proj+k_proj.weight` is `attn.q_proj.weight` and `attn.k_proj.weight`.
    """
    origin = value.metadata_props.get(FOLDED_FROM)
    if origin is not None:
        names = ast.literal_eval(origin)
        return [(str(names[0]),)] if isinstance(names, list) and len(names) == 1 else []
    name = _QUANTIZED.sub("", str(value.name))
    if "+" not in name:
        return [(name,)]
    columns = [part.split("+") for part in name.split(".")]
    count = max(len(column) for column in columns)
    readings = []
    if all(len(column) in (1, count) for column in columns):
        rows = zip(*(column * count if len(column) == 1 else column for column in columns), strict=True)
        readings.append(tuple(".".join(row) for row in rows))
    # the last two are of names with unequal numbers of parts, and of a module whose own name has the sign
    return [*readings, tuple(name.split("+")), (name,)]
