"""A plan as the manifest records it, and back."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from gralora_fx.errors import ExportError
from gralora_fx.exporters.quantization.formats import BLOCK_BITS, DYNAMIC, Blocks, Columns
from gralora_fx.exporters.quantization.plan import QuantizationPlan
from gralora_fx.graph.pipeline import PassLog
from gralora_fx.runtime.quantized_weights import QuantizedWeights


class Counts(NamedTuple):
    """Numbers of matmuls and of lookups that read quantized values, and of the quantized values."""

    multiplications: int
    lookups: int
    values: int


def quantized_weights(plan: QuantizationPlan | None, log: PassLog) -> QuantizedWeights | None:
    """What the manifest says of the quantized weights of all models of an export; None where there are none.

    Args:
        plan: How they were quantized.
        log: What the passes did, those that quantized among them.
    """
    if plan is None:
        return None
    counts = log.summaries(Counts)
    multiplications, lookups, values = (sum(numbers) for numbers in zip(*counts, strict=True))
    form = plan.default
    blocks = form if isinstance(form, Blocks) else None
    return QuantizedWeights(
        kind=DYNAMIC if blocks is None else f"int{blocks.bits}",
        block_size=None if blocks is None else blocks.block_size,
        accuracy_level=None if blocks is None else blocks.accuracy_level,
        zero_points=None if blocks is None else blocks.zero_points,
        multiplications=multiplications,
        lookups=lookups,
        values=values,
    )


def plan_of(weights: QuantizedWeights) -> QuantizationPlan:
    """How the weights of an export were quantized, by its manifest.

    Raises:
        ExportError: It is of a kind, or has a value, that no export has.
    """
    if weights.block_size is None or weights.accuracy_level is None or weights.zero_points is None:
        _check_kind(weights.kind, (DYNAMIC,))
        return QuantizationPlan(Columns())
    _check_kind(weights.kind, BLOCK_BITS)
    form = Blocks(BLOCK_BITS[weights.kind], weights.block_size, weights.accuracy_level, weights.zero_points)
    return QuantizationPlan(form)


def _check_kind(kind: str, known: Collection[str]) -> None:
    if kind not in known:
        choices = " or ".join(map(repr, known))
        raise ExportError(
            f"the manifest says that weights are {kind!r}, and such are {choices}; export the model again"
        )
