"""Products with blocks: `MatMulNBits`, and lookups in tables of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.errors import ExportError, option
from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.quantize.block_arrays import BlockArrays, dequantize_blocks, digest_of_blocks
from gralora_fx.exporters.quantize.block_search import scale_dtype
from gralora_fx.exporters.quantize.quantized_arrays import in_usual_order, order_of, quantize_blocks
from gralora_fx.exporters.rules.builder import MICROSOFT, Builder, add_initializer, replace_value
from gralora_fx.exporters.rules.products.constant_matrices import (
    ComputedTogether,
    ConstantMatrix,
    matrix_of,
    replace_product,
)
from gralora_fx.exporters.rules.products.quantized_products import INPUT_ORDER
from gralora_fx.exporters.translation.weights import LazyTensor, derived

_NEAR = 0.25  # largest squared error of a matrix's blocks, relative to its squares
_EQUAL = 1e-5  # the same of kept integers, where the matrix is rounded to 16 bits
_BlocksOf: TypeAlias = Callable[[Sequence[str], tuple[int, int], Blocks], BlockArrays | None]


class BlockValues(NamedTuple):
    """The initializers of a quantized matrix."""

    packed: ir.Value  # `[N, K/block, block * bits / 8]`, uint8
    scales: ir.Value  # `[N, K/block]`, after the cast that widens them if they are stored in fewer bits
    # `[N, ceil(K/block * bits / 8)]`, uint8; None if all are the middle of the integers' range
    zero_points: ir.Value | None

    @property
    def present(self) -> list[ir.Value]:
        """The initializers present, in the order of an operator's inputs."""
        return [value for value in self if value is not None]


@dataclass(frozen=True)
class BlockProducts:
    """Products of a graph with matrices that are stored as blocks.

    Before: `y = MatMul(x, w)`, `w [K, N]`; `y = Gemm(x, w, b)`; `e = Gather(table, ids)`
    After:  `y = MatMulNBits(x, w_Q4 [N, K/block, bytes], w_scales [N, K/block], w_zero_points [N, bytes])`, and the
            bias added behind it; `e = GatherBlockQuantized(table_Q4, ids, table_scales, table_zero_points)` for a table
            that is tied to a head, as in onnxruntime-genai; other tables keep their precision

    Scales stored in fewer bits than a float are followed by a `Cast`, which ONNX Runtime folds when it opens the model.
    Blocks of inputs in another order read them through a `Gather` marked `INPUT_ORDER`, which products of one input
    share. A matrix is read and quantized when it is written.
    """

    graph: ir.Graph  # the model's graph, which gets the initializers
    form: Blocks  # how they are stored
    # the blocks of a matrix that is rounded already, by the names of its parameters, its sizes and format
    blocks_of: _BlocksOf
    digests: dict[str, str] = field(default_factory=dict)  # gets those of matrices that were rounded by search
    _stored: dict[ConstantMatrix, BlockValues] = field(default_factory=dict, init=False)
    _ordered: dict[tuple[ir.Value, ir.Graph], ir.Value] = field(default_factory=dict, init=False)

    @property
    def matrices(self) -> tuple[ConstantMatrix, ...]:
        """The matrices that are stored as blocks."""
        return tuple(self._stored)

    def multiply(self, node: ir.Node, matrix: ConstantMatrix) -> None:
        """Replace a node by the quantized product."""
        (inputs, outputs), form = matrix.sizes, self.form
        attributes: dict[str, Any] = {"K": inputs, "N": outputs, "bits": form.bits, "block_size": form.block_size}
        if form.accuracy_level:
            attributes["accuracy_level"] = form.accuracy_level
        operands = [self._in_order(node, matrix), *self._blocks(matrix).present]
        replace_product(node, [ir.node("MatMulNBits", operands, attributes=attributes, domain=MICROSOFT)])

    def _in_order(self, node: ir.Node, matrix: ConstantMatrix) -> ir.Value | None:
        """Return a product's input in the order of the blocks."""
        value, graph, order = node.inputs[0], node.graph, self.form.order
        if value is None or order is None:
            return value
        assert isinstance(graph, ir.Graph)
        if (value, graph) not in self._ordered:
            name = f"input_order_{order}"
            places = self.graph.initializers.get(name)
            if places is None:
                tensor = derived([matrix.tensor], ("order", order), lambda: ir.tensor(order_of(order), name=name))
                places = add_initializer(self.graph, tensor)
            gather = ir.node("Gather", [value, places], attributes={"axis": -1})
            gather.metadata_props[INPUT_ORDER] = "1"
            gather.outputs[0].type, gather.outputs[0].shape = value.type, value.shape
            graph.insert_before(node, gather)
            self._ordered[value, graph] = gather.outputs[0]
        return self._ordered[value, graph]

    def store_table(self, name: str) -> None:
        """Store an embedding as blocks too, though no head of this model is tied to it."""
        table = self.graph.initializers.get(name)
        if table is not None and _is_looked_up(table, self.form):
            self._blocks(ConstantMatrix(table, True))

    def look_up(self) -> int:
        """Let lookups in tables that are tied to a head read the head's blocks, so that they are stored once."""
        tables = {matrix.value: blocks for matrix, blocks in self._stored.items() if matrix.is_transposed}
        return sum(_gather(table, blocks, self.form) for table, blocks in tables.items())

    def _blocks(self, matrix: ConstantMatrix) -> BlockValues:
        if matrix not in self._stored:
            self._stored[matrix] = _initializers(self.graph, matrix, self)
        return self._stored[matrix]


def _quantized(matrix: ConstantMatrix, form: Blocks, blocks_of: _BlocksOf) -> list[NDArray[Any]]:
    """Return a matrix's packed integers, its scales and, if it has any, its zero points."""
    name, dtype = str(matrix.value.name), matrix.tensor.dtype
    rounded = blocks_of(matrix.names, matrix.sizes, form)
    if rounded is not None and _is_rounding(rounded, matrix, form):
        return _stored(rounded, form, dtype)
    if form.rounding == "kept":
        raise ExportError(
            f"the integers of {name} cannot be kept: the export multiplies by other values than those of "
            f"the checkpoint; take {option(quantize='int8')} or {option(quantize='float')}"
        )
    groups = (quantized_columns(columns, form, dtype, name) for columns in matrix.column_groups())
    return [np.concatenate(arrays) for arrays in zip(*groups, strict=True)]


def quantized_columns(columns: NDArray[Any], form: Blocks, dtype: ir.DataType, name: str) -> list[NDArray[Any]]:
    """Return the packed integers of columns, their scales and, if they have any, their zero points."""
    columns = np.ascontiguousarray(columns)
    columns = columns if columns.dtype in (np.float32, np.float16) else columns.astype(np.float32)
    return _stored(quantize_blocks(columns, form, None, name), form, dtype)


def _stored(blocks: BlockArrays, form: Blocks, dtype: ir.DataType) -> list[NDArray[Any]]:
    scales = blocks.scales.astype(stored_as(form, dtype).numpy())
    return [blocks.packed, scales, *([] if blocks.zero_points is None else [blocks.zero_points])]


def _is_rounding(blocks: BlockArrays, matrix: ConstantMatrix, form: Blocks) -> bool:
    """Return whether blocks approximate a matrix; not if it was changed since, or is multiplied transposed."""
    error, whole, end = 0.0, 0.0, 0
    for columns in matrix.column_groups():
        begin, end = end, end + columns.shape[1]
        part = BlockArrays(*(None if array is None else array[begin:end] for array in blocks))  # type: ignore[arg-type]
        change = in_usual_order(dequantize_blocks(part, form.bits, len(columns)), form.order) - columns.T
        error, whole = error + float(np.square(change).sum()), whole + float(np.square(columns, dtype=np.float32).sum())
    return error <= (_EQUAL if form.rounding == "kept" else _NEAR) * whole


def _initializers(graph: ir.Graph, matrix: ConstantMatrix, products: BlockProducts) -> BlockValues:
    """Add initializers for a matrix's packed integers, scales and zero points."""
    form = products.form
    (inputs, outputs), dtype = matrix.sizes, matrix.tensor.dtype
    count, bits = -(-inputs // form.block_size), form.bits
    name = matrix.free_name(graph, f"_Q{bits}")
    parts = [
        (f"{name}_Q{bits}", ir.DataType.UINT8, (outputs, count, form.block_size * bits // 8)),
        (f"{name}_scales", stored_as(form, dtype), (outputs, count)),
    ]
    if form.zero_points:
        parts.append((f"{name}_zero_points", ir.DataType.UINT8, (outputs, -(-count * bits // 8))))

    def computed_arrays() -> list[NDArray[Any]]:
        arrays = _quantized(matrix, form, products.blocks_of)
        if form.rounding == "searched":
            products.digests[parts[0][0]] = digest_of_blocks(arrays)
        return arrays

    def quantized() -> list[LazyTensor]:
        computed = ComputedTogether(computed_arrays)
        return [
            LazyTensor(label, kind, ir.Shape(shape), functools.partial(computed.tensor, index))
            for index, (label, kind, shape) in enumerate(parts)
        ]

    tensors = derived([matrix.tensor], ("blocks", name, matrix.is_transposed, form), quantized)
    packed, scales, *zero_points = [add_initializer(graph, part) for part in tensors]
    return BlockValues(packed, widened(graph, scales, dtype), zero_points[0] if zero_points else None)


def stored_as(form: Blocks, dtype: ir.DataType) -> ir.DataType:
    """Return the ONNX dtype in which scales of a matrix of some dtype are stored (see `scale_dtype`)."""
    return ir.DataType.from_numpy(scale_dtype(form, dtype.numpy()))


def widened(graph: ir.Graph, scales: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return scales in the dtype that products take, behind a cast if they are stored in another."""
    if scales.dtype == dtype:
        return scales
    build = Builder(graph)
    value = build("Cast", scales, to=int(dtype))
    value.shape, value.type = scales.shape, ir.TensorType(dtype)
    build.insert_before(graph[0])
    return value


def _gather(table: ir.Value, blocks: BlockValues, form: Blocks) -> int:
    """Redirect lookups in a table that is tied to a head to the head's blocks, so that it is stored once."""
    if not _is_looked_up(table, form):
        return 0
    assert table.shape is not None
    rows = int(table.shape.numpy()[0])
    readers = [use.node for use in table.uses()]
    for node in readers:
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        shape = ir.node("Constant", [], attributes={"value_ints": [rows, -1]})
        flattened = ir.node("Reshape", [blocks.packed, shape.outputs[0]])
        attributes = {"bits": form.bits, "block_size": form.block_size, "gather_axis": 0, "quantize_axis": 1}
        lookup = ir.node(
            "GatherBlockQuantized",
            [flattened.outputs[0], node.inputs[1], *blocks.present[1:]],
            attributes=attributes,
            domain=MICROSOFT,
        )
        replace_value(lookup.outputs[0], node.outputs[0])
        graph.insert_before(node, [shape, flattened, lookup])
        graph.remove(node, safe=True)
    return len(readers)


def _is_looked_up(table: ir.Value, form: Blocks) -> bool:
    """Return whether all remaining readers of a table are row lookups, which quantized blocks support."""
    assert table.shape is not None
    width = table.shape[1] if len(table.shape) == 2 else None
    fits = isinstance(width, int) and width % form.block_size == 0
    return fits and all(use.node.op_type == "Gather" and _axis(use.node) == 0 for use in table.uses())


def tables_of_heads(model: ir.Model) -> set[str]:
    """Return the names of matrices that are both looked up and multiplied by."""
    matrices = [matrix for node in model.graph.all_nodes() if (matrix := matrix_of(node)) is not None]
    weights = [matrix.value for matrix in matrices if matrix.is_transposed]
    return {str(weight.name) for weight in weights if any(use.node.op_type == "Gather" for use in weight.uses())}


def _axis(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return 0 if attribute is None else attribute.as_int()
