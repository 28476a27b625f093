"""The pass that quantizes a model: it asks the plan for each matrix, and writes the product of its format."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.block_products import BlockProducts, tables_of_heads
from gralora_fx.exporters.onnx_passes.column_products import ColumnProducts
from gralora_fx.exporters.onnx_passes.constant_matrices import (
    drop_unread,
    matrix_of,
    num_values,
    unquantized,
)
from gralora_fx.exporters.onnx_pipeline import FLOAT_MATRICES
from gralora_fx.exporters.quantization.formats import Blocks, Format
from gralora_fx.exporters.quantization.plan import QuantizationPlan
from gralora_fx.exporters.quantization.record import Counts
from gralora_fx.graph.pipeline import Pass, PassResult, contract


@contract(needs={FLOAT_MATRICES}, ends={FLOAT_MATRICES})
@dataclass(frozen=True)
class QuantizeWeights:
    """Store constant matrices as the plan says (see `BlockProducts` and `ColumnProducts` for the graphs).

    Attributes:
        plan: The format of each matrix.
        tables: Names of embeddings that are a head's weight in another part of the model, so that they are stored as
            the head is in this one too.
    """

    plan: QuantizationPlan
    tables: frozenset[str] = frozenset()

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Quantize them, in place; the summary is `Counts`."""
        tables = self.tables | tables_of_heads(model)
        products = _Products(model.graph)
        multiplications = 0
        for node in list(model.graph.all_nodes()):
            matrix = matrix_of(node)
            form = None if matrix is None else self.plan.format_of(matrix.names)
            if matrix is not None and form is not None:
                products.of(form).multiply(node, matrix)
                multiplications += 1
        matrices = [matrix for writer in products.writers.values() for matrix in writer.matrices]
        values = num_values(matrix.value for matrix in matrices)
        for name in tables:
            form = self.plan.format_of([name])
            writer = None if form is None else products.of(form)
            if isinstance(writer, BlockProducts):
                writer.store_table(name)
        blocks = [writer for writer in products.writers.values() if isinstance(writer, BlockProducts)]
        lookups = sum(writer.look_up() for writer in blocks)
        names = [str(matrix.value.name) for writer in products.writers.values() for matrix in writer.matrices]
        drop_unread(model.graph, names)
        return PassResult(
            multiplications + lookups, unquantized(model), summary=Counts(multiplications, lookups, values)
        )


@dataclass(frozen=True)
class _Products:
    """What writes the products of each format into a graph."""

    graph: ir.Graph
    writers: dict[Format, BlockProducts | ColumnProducts] = field(default_factory=dict)

    def of(self, form: Format) -> BlockProducts | ColumnProducts:
        """The writer of a format."""
        if form not in self.writers:
            self.writers[form] = (
                BlockProducts(self.graph, form) if isinstance(form, Blocks) else ColumnProducts(self.graph, form)
            )
        return self.writers[form]


def quantization_passes(
    plan: QuantizationPlan | None, tables: frozenset[str] = frozenset()
) -> tuple[Pass[ir.Model], ...]:
    """The pass that quantizes a model, to be run last: all others look for float matrices.

    Args:
        plan: How it is quantized; None for not at all.
        tables: Names of embeddings that are a head's weight in another part of the model.
    """
    return () if plan is None else (QuantizeWeights(plan, tables),)
