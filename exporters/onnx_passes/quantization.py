"""What quantizes a model: the pass for each kind, and what the manifest says of it."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.constant_matrices import Counts
from gralora_fx.exporters.onnx_passes.quantize import QuantizeWeights
from gralora_fx.exporters.onnx_passes.quantize_dynamic import quantize_dynamically
from gralora_fx.exporters.options import DynamicQuantization, Quantization
from gralora_fx.graph.pipeline import Pass, PassLog
from gralora_fx.runtime.quantized_weights import QuantizedWeights


def quantization_passes(
    quantization: Quantization | DynamicQuantization | None, tables: frozenset[str] = frozenset()
) -> tuple[Pass[ir.Model], ...]:
    """The passes that quantize a model, to be run last: all others look for float matrices.

    Args:
        quantization: How it is quantized; None for not at all.
        tables: Names of embeddings that are a head's weight in another part of the model.
    """
    if quantization is None:
        return ()
    if isinstance(quantization, DynamicQuantization):
        return (quantize_dynamically,)
    return (QuantizeWeights(quantization, tables),)


def quantized_weights(quantization: Quantization | DynamicQuantization | None, log: PassLog) -> QuantizedWeights | None:
    """What the manifest says of the quantized weights of all models of an export; None where there are none.

    Args:
        quantization: How they were quantized.
        log: What the passes did, those that quantized among them.
    """
    if quantization is None:
        return None
    counts = log.summaries(Counts)
    multiplications, lookups, values = (sum(numbers) for numbers in zip(*counts, strict=True))
    blocks = quantization if isinstance(quantization, Quantization) else None
    return QuantizedWeights(
        kind=quantization.kind,
        block_size=None if blocks is None else blocks.block_size,
        accuracy_level=None if blocks is None else blocks.accuracy_level,
        zero_points=None if blocks is None else blocks.zero_points,
        multiplications=multiplications,
        lookups=lookups,
        values=values,
    )


def quantization_of(weights: QuantizedWeights) -> Quantization | DynamicQuantization:
    """How the weights of an export were quantized, by its manifest.

    Raises:
        ExportError: It is of a kind, or has a value, that no export has.
    """
    if weights.block_size is None or weights.accuracy_level is None or weights.zero_points is None:
        return DynamicQuantization(weights.kind)
    return Quantization(weights.kind, weights.block_size, weights.accuracy_level, weights.zero_points)
