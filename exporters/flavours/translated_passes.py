"""What a graph goes through as it was translated, where no cache is fused into its attention."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from gralora_fx.exporters.adapters_as_data import DataSites
from gralora_fx.exporters.onnx_passes.clean_up import FoldConstants, remove_unused_nodes
from gralora_fx.exporters.onnx_passes.data_adapters import marking_passes
from gralora_fx.exporters.onnx_passes.flatten_tokens import FlattenTokens
from gralora_fx.exporters.onnx_passes.fold_transposes import fold_transposes
from gralora_fx.exporters.onnx_passes.normalization import LowerNorms
from gralora_fx.exporters.onnx_passes.plain_attention import FuseDotProductAttention
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.graph.pipeline import Pass


def translated_passes(
    options: ExportOptions, data: DataSites | None, may_fold: Callable[[ir.Node], bool | None]
) -> tuple[Pass[ir.Model], ...]:
    """The first passes, in their order.

    Args:
        options: The options of the export.
        data: The layers whose adapters are data of the model; None for none.
        may_fold: Whether constants may be folded at a node.
    """
    return (
        *marking_passes(data),  # first: weights have their own names
        fold_transposes,  # first: constant folding would compute the transposes of weights
        FuseDotProductAttention(),  # before constants are folded: it makes some
        LowerNorms(fuses_additions=False),  # on a CPU the fused operator is slower than both
        FoldConstants(may_fold),
        remove_unused_nodes,  # so that none of them counts as a reader of tokens
        FlattenTokens(not options.keep_padding),  # what lies between one attention and the next
    )
