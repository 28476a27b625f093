"""The passes that make adapters data of a model: marks at the beginning of a pipeline, insertion at its end."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.adapters_as_data import DataSites
from gralora_fx.exporters.onnx_passes.insert_adapters import InsertAdapters
from gralora_fx.exporters.onnx_passes.mark_sites import MarkSites
from gralora_fx.graph.pipeline import Pass


def marking_passes(data: DataSites | None) -> tuple[Pass[ir.Model], ...]:
    """What marks the layers' outputs, to be run first: weights must have their own names.

    Args:
        data: The layers; None for none.
    """
    return () if data is None else (MarkSites(data.weights, data.norm_biases),)


def insertion_passes(data: DataSites | None, *, quantized: bool) -> tuple[Pass[ir.Model], ...]:
    """What inserts the adapters, to be run once all is fused, and before weights are quantized.

    Args:
        data: The layers; None for none.
        quantized: Whether the weights are to be quantized.
    """
    return () if data is None else (InsertAdapters(data.inputs, quantized),)
