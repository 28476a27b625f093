"""Weight-only quantization to int4 or int8 blocks with a scale and a zero point, by onnxruntime's own quantizer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from gralora_fx.exporters.onnx_passes.builder import MICROSOFT, add_initializer, replace_value
from gralora_fx.exporters.onnx_passes.constant_matrices import (
    ConstantMatrix,
    Counts,
    drop_unread,
    matrix_of,
    num_values,
    replace_product,
    unquantized,
)
from gralora_fx.exporters.onnx_pipeline import FLOAT_MATRICES
from gralora_fx.exporters.options import Quantization
from gralora_fx.exporters.translation.weights import LazyTensor, derived
from gralora_fx.graph.pipeline import PassResult, contract


@contract(needs={FLOAT_MATRICES}, ends={FLOAT_MATRICES})
@dataclass(frozen=True)
class QuantizeWeights:
    """Store constant matrices as blocks of small integers (see `quantize_weights`).

    Attributes:
        quantization: Width, block size, accuracy level and zero points.
        tables: Names of embeddings that are a head's weight in another part of the model, so that they are blocks in
            this one too.
    """

    quantization: Quantization
    tables: frozenset[str] = frozenset()

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Quantize them, in place; the summary is `Counts`."""
        counts = quantize_weights(model, self.quantization, tables=self.tables | tables_of_heads(model))
        return PassResult(counts.multiplications + counts.lookups, unquantized(model), summary=counts)


def quantize_weights(model: ir.Model, quantization: Quantization, *, tables: Collection[str] = ()) -> Counts:
    """Store constant matrices as quantized blocks, and use operators that multiply with those.

    Before: `y = MatMul(x, w)`, `w [K, N]`; `y = Gemm(x, w, b)`; `e = Gather(table, ids)`
    After:  `y = MatMulNBits(x, w_Q4 [N, K/block, bytes], w_scales [N, K/block], w_zero_points [N, bytes])`, and the
            bias added behind it; `e = GatherBlockQuantized(table_Q4, ids, table_scales, table_zero_points)` for a table
            that is tied to a head

    A matrix is read and quantized when it is written. An embedding that is not tied to a head keeps its precision, as
    in onnxruntime-genai.

    Args:
        model: The model; it is changed in place.
        quantization: Width, block size, accuracy level and zero points.
        tables: Names of embeddings to quantize too, though no head of this model is tied to them.

    Returns:
        The number of nodes replaced.
    """
    blocks: dict[ConstantMatrix, Blocks] = {}
    replaced = lookups = 0
    for node in list(model.graph.all_nodes()):
        matrix = matrix_of(node)
        if matrix is None:
            continue
        if matrix not in blocks:
            blocks[matrix] = _blocks(model.graph, matrix, quantization)
        _multiply(node, matrix, blocks[matrix], quantization)
        replaced += 1
    values = num_values(matrix.value for matrix in blocks)
    for name in sorted(tables):
        table = model.graph.initializers.get(name)
        if table is not None and (table, True) not in blocks and _is_looked_up(table, quantization):
            matrix = ConstantMatrix(table, True)
            blocks[matrix] = _blocks(model.graph, matrix, quantization)
    for matrix, parts in blocks.items():
        if matrix.is_transposed:
            lookups += _gather(matrix.value, parts, quantization)
    if blocks:
        drop_unread(model.graph, [str(matrix.value.name) for matrix in blocks])
    return Counts(replaced, lookups, values)


class Blocks(NamedTuple):
    """The initializers of a quantized matrix.

    Attributes:
        packed: `[N, K/block, block * bits / 8]`, uint8.
        scales: `[N, K/block]`.
        zero_points: `[N, ceil(K/block * bits / 8)]`, uint8; None where all are half of the integers' range.
    """

    packed: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None


@dataclass
class _QuantizedBlocks:
    """A matrix's blocks, whose parts are computed together, and dropped once all are written."""

    matrix: ConstantMatrix
    quantization: Quantization
    _parts: dict[int, NDArray[Any]] = field(default_factory=dict, init=False)

    def part(self, index: int) -> ir.TensorProtocol:
        """Packed integers, scales or zero points, by their place in `Blocks`."""
        if index not in self._parts:
            groups = zip(*map(self._group, self.matrix.column_groups()), strict=True)
            self._parts = {place: np.concatenate(arrays) for place, arrays in enumerate(groups)}
        return ir.tensor(self._parts.pop(index))

    def _group(self, columns: NDArray[Any]) -> list[NDArray[Any]]:
        """The blocks of a group of columns."""
        columns = np.ascontiguousarray(columns)
        columns = columns if columns.dtype in (np.float32, np.float16) else columns.astype(np.float32)
        blocks = quantize_blocks(columns, self.quantization)
        scales = blocks.scales.astype(self.matrix.tensor.dtype.numpy())
        return [blocks.packed, scales, *([] if blocks.zero_points is None else [blocks.zero_points])]


@functools.cache
def _quantizer(quantization: Quantization) -> Callable[[NDArray[Any]], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """ONNX Runtime's quantization of one matrix `[K, N]` to packed integers, scales and zero points."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizers  # it sets up logging when it is imported

    root.handlers, root.level = handlers, level
    config = quantizers.DefaultWeightOnlyQuantConfig(
        block_size=quantization.block_size, is_symmetric=not quantization.zero_points, bits=quantization.bits
    )
    quantize: Callable[..., Any] = quantizers.DefaultWeightOnlyQuantizer(config).qbits_block_quant
    return quantize


class BlockArrays(NamedTuple):
    """The values of a quantized matrix.

    Attributes:
        packed: `[N, K/block, block * bits / 8]`, uint8.
        scales: `[N, K/block]`.
        zero_points: `[N, ceil(K/block * bits / 8)]`, uint8; None where all are half of the integers' range.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[Any]
    zero_points: NDArray[np.uint8] | None


def quantize_blocks(matrix: NDArray[Any], quantization: Quantization) -> BlockArrays:
    """A matrix as blocks, by ONNX Runtime's quantizer.

    Args:
        matrix: `[K, N]`, float32 or float16.
        quantization: How to quantize it.

    Returns:
        The blocks, scales in the matrix's dtype.
    """
    packed, scales, zero_points = _quantizer(quantization)(matrix)
    return BlockArrays(packed, scales, zero_points if quantization.zero_points else None)


def dequantize_blocks(blocks: BlockArrays, bits: int, inputs: int) -> NDArray[np.float32]:
    """The values of blocks, `[N, K]`.

    Args:
        blocks: The blocks, scales in float32.
        bits: Bits of a value.
        inputs: K.
    """
    packed, scales, zero_points = blocks
    zeros: Any = 2.0 ** (bits - 1)
    if zero_points is not None:
        zeros = _integers(zero_points, bits)[:, : packed.shape[1], None]
    values = (_integers(packed, bits) - zeros) * scales[..., None]
    rows: NDArray[np.float32] = values.reshape(len(packed), -1)[:, :inputs]
    return rows


def dequantize(matrix: NDArray[Any], quantization: Quantization, dtype: torch.dtype) -> NDArray[np.float32]:
    """A matrix quantized and dequantized again.

    Args:
        matrix: `[K, N]`, float32 or float16.
        quantization: How it is quantized.
        dtype: Dtype of the scales.
    """
    blocks = quantize_blocks(matrix, quantization)
    scales = torch.from_numpy(blocks.scales).to(dtype).float().numpy()
    rows = dequantize_blocks(blocks._replace(scales=scales), quantization.bits, matrix.shape[0])
    return np.ascontiguousarray(rows.T)


def _integers(packed: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """The integers of bytes along the last axis; of two in a byte the first is the low nibble."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return packed.astype(np.float32)


def _blocks(graph: ir.Graph, matrix: ConstantMatrix, quantization: Quantization) -> Blocks:
    """Add initializers for a matrix's packed integers, scales and zero points."""
    (inputs, outputs), dtype = matrix.sizes, matrix.tensor.dtype
    count, bits = -(-inputs // quantization.block_size), quantization.bits
    name = matrix.free_name(graph, f"_Q{bits}")
    parts = [
        (f"{name}_Q{bits}", ir.DataType.UINT8, (outputs, count, quantization.block_size * bits // 8)),
        (f"{name}_scales", dtype, (outputs, count)),
    ]
    if quantization.zero_points:
        parts.append((f"{name}_zero_points", ir.DataType.UINT8, (outputs, -(-count * bits // 8))))

    def quantized() -> list[LazyTensor]:
        computed = _QuantizedBlocks(matrix, quantization)
        return [
            LazyTensor(label, kind, ir.Shape(shape), functools.partial(computed.part, index))
            for index, (label, kind, shape) in enumerate(parts)
        ]

    tensors = derived([matrix.tensor], ("blocks", name, matrix.is_transposed, quantization), quantized)
    packed, scales, *zero_points = [add_initializer(graph, part) for part in tensors]
    return Blocks(packed, scales, zero_points[0] if zero_points else None)


def _multiply(node: ir.Node, matrix: ConstantMatrix, blocks: Blocks, quantization: Quantization) -> None:
    inputs, outputs = matrix.sizes
    attributes: dict[str, Any] = {
        "K": inputs,
        "N": outputs,
        "bits": quantization.bits,
        "block_size": quantization.block_size,
    }
    if quantization.accuracy_level:
        attributes["accuracy_level"] = quantization.accuracy_level
    product = ir.node("MatMulNBits", [node.inputs[0], *_present(blocks)], attributes=attributes, domain=MICROSOFT)
    replace_product(node, [product])


def _present(blocks: Blocks) -> list[ir.Value]:
    return [value for value in blocks if value is not None]


def _gather(table: ir.Value, blocks: Blocks, quantization: Quantization) -> int:
    """Let lookups in a table that is tied to a head read the head's blocks, so that it is stored once."""
    if not _is_looked_up(table, quantization):
        return 0
    assert table.shape is not None
    rows = int(table.shape.numpy()[0])
    readers = [use.node for use in table.uses()]
    for node in readers:
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        shape = ir.node("Constant", [], attributes={"value_ints": [rows, -1]})
        flattened = ir.node("Reshape", [blocks.packed, shape.outputs[0]])
        attributes = {
            "bits": quantization.bits,
            "block_size": quantization.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        lookup = ir.node(
            "GatherBlockQuantized",
            [flattened.outputs[0], node.inputs[1], *_present(blocks)[1:]],
            attributes=attributes,
            domain=MICROSOFT,
        )
        replace_value(lookup.outputs[0], node.outputs[0])
        graph.insert_before(node, [shape, flattened, lookup])
        graph.remove(node, safe=True)
    return len(readers)


def _is_looked_up(table: ir.Value, quantization: Quantization) -> bool:
    """Whether all remaining readers of a table are row lookups, which quantized blocks support."""
    assert table.shape is not None
    width = table.shape[1] if len(table.shape) == 2 else None
    fits = isinstance(width, int) and width % quantization.block_size == 0
    return fits and all(use.node.op_type == "Gather" and _axis(use.node) == 0 for use in table.uses())


def tables_of_heads(model: ir.Model) -> set[str]:
    """Names of the matrices that are both looked up and multiplied by."""
    matrices = [matrix for node in model.graph.all_nodes() if (matrix := matrix_of(node)) is not None]
    weights = [matrix.value for matrix in matrices if matrix.is_transposed]
    return {str(weight.name) for weight in weights if any(use.node.op_type == "Gather" for use in weight.uses())}


def _axis(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return 0 if attribute is None else attribute.as_int()
