"""Products with columns: int8 weights with a scale a column, and activations that are rounded to uint8 as they come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.errors import ExportError
from gralora_fx.exporters.onnx_passes.builder import add_initializer
from gralora_fx.exporters.onnx_passes.constant_matrices import ConstantMatrix, replace_product
from gralora_fx.exporters.quantization.column_arrays import quantize_columns
from gralora_fx.exporters.quantization.formats import Columns
from gralora_fx.exporters.translation.weights import LazyTensor, derived


@dataclass(frozen=True)
class ColumnProducts:
    """Products of a graph in int8.

    Before: `y = MatMul(x, w)`, `w [K, N]`; `y = Gemm(x, w, b)`
    After:  `q, s, z = DynamicQuantizeLinear(x)`
            `y = Cast(MatMulInteger(q, w_quantized [K, N], z)) * (s * w_scale [N])`, and the bias added behind it

    These are the nodes of onnxruntime's own `quantize_dynamic` (QInt8, per channel, reduced range) with its values,
    which its graph optimizations fuse to one operator. The range of `x` is that of the whole tensor; products of one
    tensor share its rounding. A matrix is read and quantized when it is written. Zero points of weights are zero, and
    left out.

    Attributes:
        graph: The model's graph, which gets the initializers.
        form: How they are stored.
    """

    graph: ir.Graph
    form: Columns
    _stored: dict[ConstantMatrix, tuple[ir.Value, ir.Value]] = field(default_factory=dict, init=False)
    _rounded: dict[tuple[int, int], ir.Node] = field(default_factory=dict, init=False)  # each tensor of each graph

    @property
    def matrices(self) -> tuple[ConstantMatrix, ...]:
        """The matrices that are stored so."""
        return tuple(self._stored)

    def store_table(self, name: str) -> None:
        """Leave an embedding as it is: rows of columns cannot be looked up."""

    def look_up(self) -> int:
        """The number of lookups: none, as tables are not stored so."""
        return 0

    def multiply(self, node: ir.Node, matrix: ConstantMatrix) -> None:
        """Put the product in the place of a node."""
        if matrix not in self._stored:
            self._stored[matrix] = _initializers(self.graph, matrix)
        _multiply(node, *self._stored[matrix], self._rounded)


class QuantizedProduct(NamedTuple):
    """The nodes of a product of a quantized export.

    Attributes:
        nodes: `DynamicQuantizeLinear`, `MatMulInteger`, `Cast`, and the `Mul` of the scales and of the result.
        input: The activations, float32 `[..., K]`.
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
    """The products of a dynamically quantized model, in order, those of branches too.

    Raises:
        ExportError: The nodes around a `MatMulInteger` are not those that the export writes.
    """
    nodes = [node for node in model.graph.all_nodes() if node.op_type == "MatMulInteger"]
    return [_product(node) for node in nodes]


def _product(node: ir.Node) -> QuantizedProduct:
    cast = _only_reader(node)
    product = None if cast is None else _only_reader(cast)
    scales = None if product is None else _producer(product, 1)
    rounding = _producer(node, 0)
    nodes = [part for part in (rounding, node, cast, scales, product) if part is not None]
    kinds = [part.op_type for part in nodes]
    if kinds != ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"]:
        raise ExportError(
            f"the product {node.name or node.outputs[0].name} is not one of an int8-dynamic export (its nodes are "
            f"{', '.join(kinds)}); export the model again"
        )
    source, weight, scale = nodes[0].inputs[0], node.inputs[1], nodes[3].inputs[1]
    assert source is not None
    assert weight is not None
    assert scale is not None
    return QuantizedProduct(tuple(nodes), source, weight, scale, nodes[-1].outputs[0])


def _only_reader(node: ir.Node) -> ir.Node | None:
    readers = [use.node for use in node.outputs[0].uses()]
    return readers[0] if len(readers) == 1 else None


def _producer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None else value.producer()


@dataclass
class _QuantizedColumns:
    """A matrix's integers and scales, which are computed together; the scales are dropped once written."""

    matrix: ConstantMatrix
    _scales: NDArray[np.float32] | None = field(default=None, init=False)

    def values(self) -> ir.TensorProtocol:
        """`[K, N]`, int8."""
        values, self._scales = self._quantized()
        return ir.tensor(values)

    def scales(self) -> ir.TensorProtocol:
        """`[N]`, float32."""
        scales = self._quantized()[1] if self._scales is None else self._scales
        self._scales = None
        return ir.tensor(scales)

    def _quantized(self) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        inputs, outputs = self.matrix.sizes
        values, scales = np.empty((inputs, outputs), np.int8), np.empty(outputs, np.float32)
        end = 0
        for columns in self.matrix.column_groups():
            begin, end = end, end + columns.shape[1]
            values[:, begin:end], scales[begin:end] = quantize_columns(columns, str(self.matrix.value.name))
        return values, scales


def _initializers(graph: ir.Graph, matrix: ConstantMatrix) -> tuple[ir.Value, ir.Value]:
    """Add initializers for a matrix's integers and scales."""
    (inputs, outputs), name = matrix.sizes, matrix.free_name(graph, "_quantized")

    def quantized() -> tuple[LazyTensor, LazyTensor]:
        computed = _QuantizedColumns(matrix)
        values = LazyTensor(f"{name}_quantized", ir.DataType.INT8, ir.Shape((inputs, outputs)), computed.values)
        return values, LazyTensor(f"{name}_scale", ir.DataType.FLOAT, ir.Shape((outputs,)), computed.scales)

    values, scales = derived([matrix.tensor], ("columns", name, matrix.is_transposed), quantized)
    return add_initializer(graph, values), add_initializer(graph, scales)


def _multiply(node: ir.Node, weight: ir.Value, scale: ir.Value, rounded: dict[tuple[int, int], ir.Node]) -> None:
    """Replace a node; `rounded` has the node that rounds each tensor of each graph, and gets that of this one."""
    source = node.inputs[0]
    assert source is not None
    nodes: list[ir.Node] = []
    name = str(node.outputs[0].name)  # of which new names are made: those that a branch draws may be taken outside it
    key = (id(node.graph), id(source))
    if key not in rounded:
        outputs = [ir.val(f"{name}_input_{part}") for part in ("quantized", "scale", "zero_point")]
        rounded[key] = ir.node("DynamicQuantizeLinear", [source], outputs=outputs)
        nodes.append(rounded[key])
    values, step, zero_point = rounded[key].outputs
    product = ir.node("MatMulInteger", [values, weight, zero_point], name=node.name)
    cast = ir.node("Cast", product.outputs, attributes={"to": ir.DataType.FLOAT})
    scales = ir.node("Mul", [step, scale])
    result = ir.node("Mul", [cast.outputs[0], scales.outputs[0]])
    for computed, part in ((product, "integers"), (cast, "cast"), (scales, "scales"), (result, "product")):
        computed.outputs[0].name = f"{name}_{part}"
    replace_product(node, [*nodes, product, cast, scales, result])
