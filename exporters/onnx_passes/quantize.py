"""Weight-only quantization to int4 or int8 blocks with a scale each, by onnxruntime's own quantizer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from gralora_fx.exporters.onnx_passes.builder import MICROSOFT, add_initializer
from gralora_fx.exporters.onnx_passes.constant_matrices import (
    Counts,
    drop_unread,
    matrix_of,
    num_values,
    replace_product,
    unquantized,
)
from gralora_fx.exporters.options import Quantization
from gralora_fx.exporters.pipeline import PassResult
from gralora_fx.exporters.translation.weights import LazyTensor, parts_of

_COLUMNS = 4096  # quantized at once


@dataclass(frozen=True)
class QuantizeWeights:
    """Store constant matrices as blocks of small integers (see `quantize_weights`).

    Attributes:
        quantization: Width, block size and accuracy level.
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
    After:  `y = MatMulNBits(x, w_Q4 [N, K/block, bytes], w_scales [N, K/block])`, and the bias added behind it;
            `e = GatherBlockQuantized(table_Q4, ids, table_scales)` for a table that is tied to a head

    Quantization is symmetric, as in onnxruntime-genai. A matrix is read and quantized when it is written. An embedding
    that is not tied to a head keeps its precision, as there.

    Args:
        model: The model; it is changed in place.
        quantization: Width, block size and accuracy level.
        tables: Names of embeddings to quantize too, though no head of this model is tied to them.

    Returns:
        The number of nodes replaced.
    """
    blocks: dict[tuple[str, bool], tuple[ir.Value, ir.Value]] = {}
    replaced = lookups = 0
    for node in list(model.graph.all_nodes()):
        match = matrix_of(node)
        if match is None:
            continue
        weight, is_transposed = match
        key = (str(weight.name), is_transposed)
        if key not in blocks:
            blocks[key] = _blocks(model.graph, weight, is_transposed, quantization)
        _multiply(node, *blocks[key], quantization)
        replaced += 1
    values = num_values(model.graph.initializers[name] for name, _ in blocks)
    for name in sorted(tables):
        table = model.graph.initializers.get(name)
        if table is not None and (name, True) not in blocks and _is_looked_up(table, quantization):
            blocks[name, True] = _blocks(model.graph, table, True, quantization)
    for (name, is_transposed), (packed, scales) in blocks.items():
        if is_transposed:
            lookups += _gather(model.graph.initializers[name], packed, scales, quantization)
    if blocks:
        drop_unread(model.graph, [name for name, _ in blocks])
    return Counts(replaced, lookups, values)


@dataclass
class _Matrix:
    """A matrix and its blocks; packed values and scales are computed together, and dropped once both are written."""

    weight: ir.TensorProtocol
    is_transposed: bool
    quantization: Quantization
    dtype: ir.DataType
    _scales: NDArray[Any] | None = field(default=None, init=False)

    def packed(self) -> ir.TensorProtocol:
        """`[N, K/block, block * bits / 8]`, uint8."""
        packed, self._scales = self._quantized()
        return ir.tensor(packed)

    def scales(self) -> ir.TensorProtocol:
        """`[N, K/block]`."""
        scales = self._quantized()[1] if self._scales is None else self._scales
        self._scales = None
        return ir.tensor(scales)

    def _quantized(self) -> tuple[NDArray[Any], NDArray[Any]]:
        packed, scales = (np.concatenate(arrays) for arrays in zip(*self._columns(), strict=True))
        return packed, scales

    def _columns(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """The blocks of successive groups of columns; of a concatenated matrix, one part at a time."""
        for matrix in (self.weight,) if self.is_transposed else parts_of(self.weight):
            values = matrix.numpy()
            for start in range(0, values.shape[0 if self.is_transposed else 1], _COLUMNS):
                yield self._part(values, start)

    def _part(self, values: NDArray[Any], start: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The blocks of a group of columns; a copy of the whole matrix would be the largest thing in memory."""
        columns = slice(start, start + _COLUMNS)
        part = np.ascontiguousarray(values[columns].T if self.is_transposed else values[:, columns])
        part = part if part.dtype in (np.float32, np.float16) else part.astype(np.float32)
        packed, scales = quantize_blocks(part, self.quantization)
        return packed, scales.astype(self.dtype.numpy())


@functools.cache
def _quantizer(quantization: Quantization) -> Callable[[NDArray[Any]], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """ONNX Runtime's quantization of one matrix `[K, N]` to packed integers, scales and zero points."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizers  # it sets up logging when it is imported

    root.handlers, root.level = handlers, level
    config = quantizers.DefaultWeightOnlyQuantConfig(
        block_size=quantization.block_size, is_symmetric=True, bits=quantization.bits
    )
    quantize: Callable[..., Any] = quantizers.DefaultWeightOnlyQuantizer(config).qbits_block_quant
    return quantize


def quantize_blocks(matrix: NDArray[Any], quantization: Quantization) -> tuple[NDArray[Any], NDArray[Any]]:
    """A matrix as packed blocks and their scales, by ONNX Runtime's quantizer.

    Args:
        matrix: `[K, N]`, float32 or float16.
        quantization: How to quantize it.

    Returns:
        `[N, K/block, bytes]`, uint8, and `[N, K/block]` in the matrix's dtype.
    """
    packed, scales, _ = _quantizer(quantization)(matrix)
    return packed, scales


def dequantize_blocks(packed: NDArray[Any], scales: NDArray[Any], bits: int, inputs: int) -> NDArray[np.float32]:
    """The values of packed blocks, `[N, K]`.

    Args:
        packed: `[N, K/block, bytes]`, uint8.
        scales: `[N, K/block]`, float32.
        bits: Bits of a value.
        inputs: K.
    """
    if bits == 4:  # the low nibble comes first
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    values = (packed.astype(np.float32) - 2.0 ** (bits - 1)) * scales[..., None]
    rows: NDArray[np.float32] = values.reshape(len(packed), -1)[:, :inputs]
    return rows


def dequantize(matrix: NDArray[Any], quantization: Quantization, dtype: torch.dtype) -> NDArray[np.float32]:
    """A matrix quantized and dequantized again.

    Args:
        matrix: `[K, N]`, float32 or float16.
        quantization: How it is quantized.
        dtype: Dtype of the scales.
    """
    packed, raw_scales = quantize_blocks(matrix, quantization)
    scales = torch.from_numpy(raw_scales).to(dtype).float().numpy()
    return np.ascontiguousarray(dequantize_blocks(packed, scales, quantization.bits, matrix.shape[0]).T)


def _blocks(
    graph: ir.Graph, weight: ir.Value, is_transposed: bool, quantization: Quantization
) -> tuple[ir.Value, ir.Value]:
    """Add initializers for a matrix's packed integers and scales."""
    tensor = weight.const_value
    assert tensor is not None
    sizes = [int(size) for size in tensor.shape.numpy()]
    inputs, outputs = reversed(sizes) if is_transposed else sizes
    count = -(-inputs // quantization.block_size)
    matrix = _Matrix(tensor, is_transposed, quantization, tensor.dtype)
    is_taken = f"{weight.name}_Q{quantization.bits}" in graph.initializers  # by the same matrix the other way round
    name = f"{weight.name}_transposed" if is_taken else str(weight.name)
    parts = (
        (
            f"{name}_Q{quantization.bits}",
            ir.DataType.UINT8,
            (outputs, count, quantization.block_size * quantization.bits // 8),
            matrix.packed,
        ),
        (f"{name}_scales", tensor.dtype, (outputs, count), matrix.scales),
    )
    values: list[ir.Value] = []
    for label, dtype, shape, make in parts:
        values.append(add_initializer(graph, LazyTensor(label, dtype, ir.Shape(shape), make)))
    return values[0], values[1]


def _multiply(node: ir.Node, packed: ir.Value, scales: ir.Value, quantization: Quantization) -> None:
    assert packed.shape is not None
    matrix = matrix_of(node)
    assert matrix is not None
    weight, is_transposed = matrix
    assert weight.shape is not None
    inputs = weight.shape[1] if is_transposed else weight.shape[0]
    attributes: dict[str, Any] = {
        "K": inputs,
        "N": packed.shape[0],
        "bits": quantization.bits,
        "block_size": quantization.block_size,
    }
    if quantization.accuracy_level:
        attributes["accuracy_level"] = quantization.accuracy_level
    product = ir.node("MatMulNBits", [node.inputs[0], packed, scales], attributes=attributes, domain=MICROSOFT)
    replace_product(node, [product])


def _gather(table: ir.Value, packed: ir.Value, scales: ir.Value, quantization: Quantization) -> int:
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
        flattened = ir.node("Reshape", [packed, shape.outputs[0]])
        attributes = {
            "bits": quantization.bits,
            "block_size": quantization.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        lookup = ir.node(
            "GatherBlockQuantized",
            [flattened.outputs[0], node.inputs[1], scales],
            attributes=attributes,
            domain=MICROSOFT,
        )
        old, new = node.outputs[0], lookup.outputs[0]
        new.type, new.shape, new.name = old.type, old.shape, old.name
        graph.insert_before(node, [shape, flattened, lookup])
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
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
    weights = [found[0] for node in model.graph.all_nodes() if (found := matrix_of(node)) is not None and found[1]]
    return {str(weight.name) for weight in weights if any(use.node.op_type == "Gather" for use in weight.uses())}


def _axis(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return 0 if attribute is None else attribute.as_int()
