"""The pass that quantizes a model: it asks the plan for each matrix's format and writes the product."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult, Skip, contract
from gralora_fx.exporters.formats import Blocks, Format
from gralora_fx.exporters.quantize.plan import Counts, QuantizationPlan
from gralora_fx.exporters.rules.attention.pack_qkv import concat_initializers
from gralora_fx.exporters.rules.builder import add_initializer
from gralora_fx.exporters.rules.onnx_pipeline import FLOAT_MATRICES
from gralora_fx.exporters.rules.products.block_products import BlockProducts, tables_of_heads
from gralora_fx.exporters.rules.products.column_products import ColumnProducts
from gralora_fx.exporters.rules.products.constant_matrices import drop_unread, matrix_of, replace_product, unquantized
from gralora_fx.exporters.translation.weights import parts_of


class Quantized(NamedTuple):
    """The weights that a feature has quantized."""

    # format, inputs, outputs and bits of the floats of each, as `Counts.of` takes them
    matrices: list[tuple[Format, int, int, int]]
    floats: tuple[Skip, ...] = ()  # weights that stay float, with the reason


@contract(needs={FLOAT_MATRICES}, ends={FLOAT_MATRICES})
@dataclass(frozen=True)
class QuantizeWeights:
    """Store constant matrices as the plan says (see `BlockProducts` and `ColumnProducts` for the graphs).

    Before: `y = MatMul(x, [Wq Wk Wv])`, if the plan gives `Wv` another format than the others
    After:  `y = Concat(<product of x with [Wq Wk]>, <product of x with Wv>)`
    """

    plan: QuantizationPlan  # the format of each matrix
    # names of embeddings that are a head's weight in another part of the model, so that they are stored as the head is
    # in this one too
    tables: frozenset[str] = frozenset()
    # functions that quantize the weights of features, given the model and the plan
    others: tuple[Callable[[ir.Model, QuantizationPlan], Quantized], ...] = ()

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Quantize them, in place; the summary is `Counts`."""
        tables = self.tables | tables_of_heads(model)
        self._part(model)
        products = _Products(model.graph, self.plan)
        multiplications = 0
        for node in list(model.graph.all_nodes()):
            matrix = matrix_of(node)
            form = None if matrix is None else self.plan.format_of(matrix.names)
            if matrix is not None and form is not None:
                products.of(form).multiply(node, matrix)
                multiplications += 1
        others = [quantize(model, self.plan) for quantize in self.others]
        matrices = [matrix for other in others for matrix in other.matrices]
        counts = Counts.of(
            [
                *(
                    (writer.form, *matrix.sizes, matrix.tensor.dtype.bitwidth)
                    for writer in products.all
                    for matrix in writer.matrices
                ),
                *matrices,
            ]
        )
        for name in sorted(tables):
            form = self.plan.format_of([name])
            if form is not None:
                products.of(form).store_table(name)
        lookups = sum(writer.look_up() for writer in products.all)
        drop_unread(model.graph, [str(matrix.value.name) for writer in products.all for matrix in writer.matrices])
        multiplications += len(matrices)
        counts = counts._replace(multiplications=multiplications, lookups=lookups)
        return PassResult(
            multiplications + lookups,
            (*unquantized(model), *(skip for other in others for skip in other.floats)),
            summary=counts,
        )

    def _part(self, model: ir.Model) -> None:
        """Replace a product with a concatenated matrix whose parts have several formats by a product for each part."""
        for node in list(model.graph.all_nodes()):
            matrix = matrix_of(node)
            parts = () if matrix is None or matrix.is_transposed else parts_of(matrix.tensor)
            groups = [list(group) for _, group in itertools.groupby(parts, self._format_of_part)]
            if matrix is None or len(groups) < 2:
                continue
            values = [[_initializer(model.graph, part) for part in group] for group in groups]
            weights = [concat_initializers(model.graph, of) if len(of) > 1 else of[0] for of in values]
            factors = [ir.node("MatMul", [node.inputs[0], weight]) for weight in weights]
            for factor in factors:
                factor.outputs[0].type = node.outputs[0].type
            joined = ir.node("Concat", [factor.outputs[0] for factor in factors], attributes={"axis": -1})
            replace_product(node, [*factors, joined])
            drop_unread(model.graph, [str(matrix.value.name), *(str(part.name) for part in parts)])

    def _format_of_part(self, part: ir.TensorProtocol) -> Format | None:
        return self.plan.format_of([str(part.name)])


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    return graph.initializers.get(str(tensor.name)) or add_initializer(graph, tensor)


@dataclass(frozen=True)
class _Products:
    """The writers of quantized products, by format."""

    graph: ir.Graph
    plan: QuantizationPlan
    writers: dict[Format, BlockProducts | ColumnProducts] = field(default_factory=dict)

    @property
    def all(self) -> tuple[BlockProducts | ColumnProducts, ...]:
        """The writers of all formats in use."""
        return tuple(self.writers.values())

    def of(self, form: Format) -> BlockProducts | ColumnProducts:
        """Return the writer of a format, created once."""
        if form not in self.writers:
            self.writers[form] = (
                BlockProducts(self.graph, form, self.plan.blocks_of, self.plan.digests)
                if isinstance(form, Blocks)
                else ColumnProducts(self.graph, form, self.plan.inputs_of)
            )
        return self.writers[form]
