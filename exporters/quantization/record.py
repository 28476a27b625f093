"""A plan as the manifest records it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gralora_fx.exporters.quantization.formats import DYNAMIC, Blocks, Format
from gralora_fx.exporters.quantization.plan import QuantizationPlan
from gralora_fx.graph.pipeline import PassLog
from gralora_fx.runtime.quantized_weights import LayerFormat, QuantizedWeights


class Counts(NamedTuple):
    """What is quantized.

    Attributes:
        multiplications: Nodes that multiply with quantized values.
        lookups: Nodes that look up rows of them.
        values: Values of the matrices that are multiplied with.
        integer_bits: Bits of their integers.
        stored_bits: The same with scales, zero points and padding.
    """

    multiplications: int
    lookups: int
    values: int
    integer_bits: int
    stored_bits: int

    @classmethod
    def of(cls, matrices: Iterable[tuple[Format, int, int, int]]) -> Counts:
        """Count matrices by format, inputs, outputs and bits of a scale; no nodes."""
        values = integers = stored = 0
        for form, inputs, outputs, scale_bits in matrices:
            values += inputs * outputs
            integers += inputs * outputs * form.bits
            stored += form.stored_bits(inputs, outputs, scale_bits)
        return cls(0, 0, values, integers, stored)


def quantized_weights(plan: QuantizationPlan | None, log: PassLog) -> QuantizedWeights | None:
    """What the manifest says of the quantized weights of all models of an export; None where there are none.

    Args:
        plan: How they were quantized.
        log: What the passes did, those that quantized among them.
    """
    if plan is None:
        return None
    counts = log.summaries(Counts)
    total = Counts(*(sum(numbers) for numbers in zip(*counts, strict=True)))
    form = plan.default
    blocks = form if isinstance(form, Blocks) else None
    return QuantizedWeights(
        kind=DYNAMIC if blocks is None else f"int{blocks.bits}",
        block_size=None if blocks is None else blocks.block_size,
        accuracy_level=None if blocks is None else blocks.accuracy_level,
        zero_points=None if blocks is None else blocks.zero_points,
        multiplications=total.multiplications,
        lookups=total.lookups,
        values=total.values,
        bits=total.integer_bits / max(1, total.values),
        stored_bits=total.stored_bits / max(1, total.values),
        chosen_by=plan.chosen_by,
        layers={
            name: LayerFormat("float" if own is None else str(own), plan.gains.get(name))
            for name, own in sorted(plan.by_matrix.items())
            if own != form
        },
    )
