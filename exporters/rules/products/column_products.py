"""Products with columns: int8 weights with one scale per column, activations rounded by row; and lookups of columns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.exporters.formats import Columns
from gralora_fx.exporters.quantize.quantized_arrays import ROW_LARGEST, ROW_TINY, ColumnInputs, quantize_columns
from gralora_fx.exporters.rules.builder import Builder, add_initializer, static_dim
from gralora_fx.exporters.rules.products.constant_matrices import ComputedTogether, ConstantMatrix, replace_product
from gralora_fx.exporters.rules.products.quantized_products import FACTORS, MARK, PRODUCT, STEP, WEIGHT
from gralora_fx.exporters.translation.weights import LazyTensor, derived

_REMAINDERS = 2 * ROW_LARGEST  # integers of a step: the rounding error is at most half a step


@dataclass(frozen=True)
class ColumnProducts:
    """Products of a graph in int8, by operators of the ONNX standard.

    Before: `y = MatMul(x, w)`, `w [K, N]`; `y = Gemm(x, w, b)`
    After:  `s = Max(ReduceMax(x * factors), -ReduceMin(x * factors), tiny) / 127`, `s [..., 1]`
            `q = QuantizeLinear(x * factors, s, 128, block_size=K)`
            `y = MatMul(DequantizeLinear(q, 1, 128), DequantizeLinear(w_quantized [K, N], w_scale [N])) * s`, and the
            bias added behind it
    After:  `r = x * factors / s - q`, `y = (MatMul(q, w) + MatMul(r rounded, w)) * s` in one product, with 16 bits

    ONNX Runtime fuses both dequantizations with the product to `MatMulIntegerToFloat`, which multiplies integers. A row
    is rounded by its own largest value, so its result is the same in any batch; products of one tensor share its
    rounding. A matrix is read and quantized when it is written.

    A vector, or a tensor of unknown rank, is divided by `s` and rounded by steps of 1: a scale of one value has no
    blocks. Factors bring channels of `x` closer to each other; the matrix is divided by them (see `input_factors`).
    """

    graph: ir.Graph  # the model's graph, which gets the initializers
    form: Columns  # how they are stored
    # statistics of a matrix's inputs, by the names of its parameters; None if unknown
    inputs_of: Callable[[Sequence[str]], ColumnInputs | None] = lambda names: None
    _stored: dict[ConstantMatrix, StoredColumns] = field(default_factory=dict, init=False)
    _rounded: dict[Hashable, tuple[ir.Value, ir.Value]] = field(default_factory=dict, init=False)
    _all_factors: dict[bytes, ir.Value] = field(default_factory=dict, init=False)

    @property
    def matrices(self) -> tuple[ConstantMatrix, ...]:
        """The matrices that are stored as columns."""
        return tuple(self._stored)

    def store_table(self, name: str) -> None:
        """Store an embedding as columns too, though no head of this model is tied to it."""
        table = self.graph.initializers.get(name)
        if table is not None and is_table(table):
            self._columns(ConstantMatrix(table, True))

    def look_up(self) -> int:
        """Let lookups in tables that are tied to a head read the head's columns, so that they are stored once."""
        tables = {matrix.value: stored for matrix, stored in self._stored.items() if matrix.is_transposed}
        return sum(look_up_columns(table, stored) for table, stored in tables.items())

    def multiply(self, node: ir.Node, matrix: ConstantMatrix) -> None:
        """Replace a node by the quantized product."""
        source, branch = node.inputs[0], node.graph
        assert source is not None
        assert isinstance(branch, ir.Graph)
        weight, scale, factors = self._columns(matrix)
        one, zero_point = self._constant("one", np.float32(1)), self._constant("zero_point", np.uint8(128))
        build = _Named(branch, str(node.outputs[0].name))
        key = (id(branch), id(source), None if factors is None else str(factors.name))
        if key not in self._rounded:
            self._rounded[key] = self._round(build, source, factors)
        values, steps = self._rounded[key]
        rounded = build("DequantizeLinear", values, one, zero_point)
        product = build("MatMul", rounded, build.marked(WEIGHT, "DequantizeLinear", weight, scale, axis=1))
        if self.form.activation_bits == 16:
            whole, rest = build.split(product, 2, axis=0)
            product = build("Add", whole, build("Mul", rest, build.tensor(1 / _REMAINDERS, ir.DataType.FLOAT)))
        build.marked(PRODUCT, "Mul", product, steps)
        replace_product(node, build.take())

    def _columns(self, matrix: ConstantMatrix) -> StoredColumns:
        if matrix not in self._stored:
            inputs = self.inputs_of(matrix.names)
            if inputs is not None and len(inputs.rest) != matrix.sizes[0]:
                inputs = None  # statistics of a parameter that is also multiplied transposed
            self._stored[matrix] = _initializers(self.graph, matrix, self._factors(matrix, inputs), inputs)
        return self._stored[matrix]

    def _round(self, build: _Named, source: ir.Value, factors: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """Return the integers of a tensor, both parts if there are two, and the step of each row."""
        one, zero_point = self._constant("one", np.float32(1)), self._constant("zero_point", np.uint8(128))
        scaled = source if factors is None else build.marked(FACTORS, "Mul", source, factors)
        high, low = (build(kind, scaled, build.ints(-1), keepdims=1) for kind in ("ReduceMax", "ReduceMin"))
        largest = build("Max", high, build("Neg", low), self._constant("least", np.float32(ROW_TINY)))
        steps = build("Div", largest, self._constant("largest", np.float32(ROW_LARGEST)))
        width = static_dim(source, -1)
        if self.form.activation_bits == 8 and width is not None and len(source.shape or ()) > 1:
            # zero points of all rows: steps that round to none
            zero_points = build("QuantizeLinear", steps, self._constant("huge", np.finfo(np.float32).max), zero_point)
            return build("QuantizeLinear", scaled, steps, zero_points, axis=-1, block_size=width), steps
        relative = build("Div", scaled, steps)
        integers = build("QuantizeLinear", relative, one, zero_point)
        if self.form.activation_bits == 16:
            rest = build("Sub", relative, build("DequantizeLinear", integers, one, zero_point))
            smaller = build.tensor(1 / _REMAINDERS, ir.DataType.FLOAT)
            integers = build("Concat", integers, build("QuantizeLinear", rest, smaller, zero_point), axis=0)
        return integers, steps

    def _constant(self, name: str, number: Any) -> ir.Value:
        """Return a constant that all products share."""
        label = f"int8_rows.{name}"
        return self.graph.initializers.get(label) or add_initializer(
            self.graph, ir.tensor(np.asarray(number), name=label)
        )

    def _factors(self, matrix: ConstantMatrix, inputs: ColumnInputs | None) -> ir.Value | None:
        """Return the factors of a matrix's input, one initializer for all products of one tensor; None without any."""
        factors = None if inputs is None else inputs.factors
        if factors is None:
            return None
        key = factors.tobytes()
        if key not in self._all_factors:
            tensor = ir.tensor(factors, name=f"{matrix.value.name}_input_factors")
            self._all_factors[key] = add_initializer(self.graph, tensor)
        return self._all_factors[key]


class _Named(Builder):
    """A builder that marks a product's nodes (see `quantized_products`), and names values after the product."""

    def __init__(self, graph: ir.Graph, name: str) -> None:
        super().__init__(graph)
        self.name = name

    def node(self, op_type: str, inputs: Any, *, domain: str = "", num_outputs: int = 1, **attributes: Any) -> ir.Node:
        """Make a marked node whose outputs have names."""
        node = super().node(op_type, inputs, domain=domain, num_outputs=num_outputs, **attributes)
        node.metadata_props[MARK] = STEP
        for index, output in enumerate(node.outputs):
            output.name = f"{self.name}_int8_{len(self.nodes)}_{index}"
        return node

    def marked(self, part: str, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Make a node that belongs to another marked part."""
        node = self.node(op_type, inputs, **attributes)
        node.metadata_props[MARK] = part
        return node.outputs[0]


def _quantized(
    matrix: ConstantMatrix, factors: NDArray[np.float32] | None, known: ColumnInputs | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return a matrix's integers `[K, N]` and scales `[N]`."""
    inputs, outputs = matrix.sizes
    values, scales = np.empty((inputs, outputs), np.int8), np.empty(outputs, np.float32)
    end = 0
    for columns in matrix.column_groups():
        begin, end = end, end + columns.shape[1]
        values[:, begin:end], scales[begin:end] = quantize_columns(columns, str(matrix.value.name), factors, known)
    return values, scales


def _initializers(
    graph: ir.Graph, matrix: ConstantMatrix, factors: ir.Value | None, known: ColumnInputs | None
) -> StoredColumns:
    """Add initializers for a matrix's integers and scales."""
    (inputs, outputs), name = matrix.sizes, matrix.free_name(graph, "_quantized")
    numbers = None if factors is None or factors.const_value is None else factors.const_value.numpy()

    def quantized() -> tuple[LazyTensor, LazyTensor]:
        computed = ComputedTogether(functools.partial(_quantized, matrix, numbers, known))
        parts = [
            (f"{name}_quantized", ir.DataType.INT8, (inputs, outputs)),
            (f"{name}_scale", ir.DataType.FLOAT, (outputs,)),
        ]
        values, scales = (
            LazyTensor(label, kind, ir.Shape(shape), functools.partial(computed.tensor, index))
            for index, (label, kind, shape) in enumerate(parts)
        )
        return values, scales

    key = ("columns", name, matrix.is_transposed, None if numbers is None else numbers.tobytes())
    values, scales = derived([matrix.tensor], key, quantized)
    return StoredColumns(add_initializer(graph, values), add_initializer(graph, scales), factors)


class StoredColumns(NamedTuple):
    """The initializers of a matrix in columns."""

    integers: ir.Value  # `[K, N]`, int8
    scale: ir.Value  # `[N]`
    factors: ir.Value | None  # `[K]`, factors of its rows; None if there are none


def is_table(value: ir.Value) -> bool:
    """Return whether all readers of a matrix `[N, K]` look up its rows."""
    return bool(value.uses()) and all(_is_lookup(use.node) for use in value.uses())


def look_up_columns(table: ir.Value, stored: StoredColumns) -> int:
    """Let lookups in a table `[N, K]` read the columns of its transpose, so that it is stored once.

    Before: `e = Gather(table [N, K], ids)`
    After:  `e = Transpose(Cast(Gather(integers [K, N], ids, axis=1))) * Unsqueeze(Gather(scale, ids), -1) * factors`
    """
    readers = [use.node for use in table.uses()]
    if not is_table(table):
        return 0
    for node in readers:
        ids, old = node.inputs[1], node.outputs[0]
        assert isinstance(node.graph, ir.Graph)
        assert ids is not None
        assert ids.shape is not None
        build = Builder(node.graph)
        integers = build("Cast", build("Gather", stored.integers, ids, axis=1), to=ir.DataType.FLOAT)
        values = build("Transpose", integers, perm=[*range(1, len(ids.shape) + 1), 0])
        scale = build("Unsqueeze", build("Gather", stored.scale, ids), [-1])
        found = build("Mul", values, scale)
        found = found if stored.factors is None else build("Mul", found, stored.factors)
        for index, made in enumerate(build.nodes):
            for output in made.outputs:
                output.name = f"{old.name}_int8_{index}"  # a generated name in a branch may be taken outside it
        build.replace(node, found)
    return len(readers)


def _is_lookup(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    return node.op_type == "Gather" and (axis is None or axis.as_int() == 0)
