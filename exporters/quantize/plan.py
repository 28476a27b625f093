"""The quantization plan of an export: a format for every matrix that a product reads, and its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gralora_fx.base.features import parts
from gralora_fx.core.graph.pipeline import PassLog
from gralora_fx.core.graph.sites import LinearSite
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.formats import DYNAMIC, KEPT, Blocks, Format
from gralora_fx.exporters.quantize.block_arrays import BlockArrays
from gralora_fx.exporters.quantize.kept import KeptWeight, StoredLayers
from gralora_fx.exporters.quantize.quantized_arrays import ColumnInputs
from gralora_fx.format.quantized_weights import EXACT_SUMS, WIDEST_EXACT, LayerFormat, QuantizedWeights


@dataclass(frozen=True)
class QuantizationPlan:
    """The format of each constant matrix, chosen before the conversion.

    Mappings are by parameter name; a parameter with several names is listed under each.
    """

    default: Format  # of every matrix that has no format of its own
    by_matrix: Mapping[str, Format | None] = field(default_factory=dict)  # None for one that stays float
    # the loss that an individual format saves, in the measure that chose it
    gains: Mapping[str, float] = field(default_factory=dict)
    chosen_by: str | None = None  # how formats were chosen, in words; None if all have the default
    # those rounded while formats were chosen (see `round_in_order`); others are rounded when they are written
    rounded: Mapping[str, BlockArrays] = field(default_factory=dict, compare=False, repr=False)
    # SHA-256 of matrices rounded by search, by their integers' names, when they are written
    digests: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    # statistics of the inputs of matrices stored in columns
    inputs: Mapping[str, ColumnInputs] = field(default_factory=dict, compare=False, repr=False)
    # weights whose stored integers are kept
    kept: Mapping[str, KeptWeight] = field(default_factory=dict, compare=False, repr=False)
    reasons: Mapping[str, str] = field(default_factory=dict)  # why other quantized weights of the base are rounded anew
    kind: str | None = None  # the export's name for the quantization; None for the default's
    # weights of linear layers and stacks of them, which alone are quantized, without a router that multiplies in
    # float32 at any precision; None for every constant matrix
    layers: Set[str] | None = field(default=None, repr=False)

    def format_of(self, names: Collection[str]) -> Format | None:
        """Return a matrix's format, or None for one that stays float."""
        if self.layers is not None and self.layers.isdisjoint(names):
            return None
        return next((self.by_matrix[name] for name in names if name in self.by_matrix), self.default)

    def blocks_of(self, names: Iterable[str], sizes: tuple[int, int], form: Blocks) -> BlockArrays | None:
        """Return the blocks of a matrix rounded while formats were chosen, or None."""
        if form.rounding == "kept":
            found = [self.kept[name].blocks() if name in self.kept else None for name in names]
        else:
            found = [self.rounded.get(name) for name in names]
        parts = [blocks for blocks in found if blocks is not None]
        inputs, outputs = sizes
        shape = (-(-inputs // form.block_size), form.block_size * form.bits // 8)
        is_whole = len(parts) == len(found) and sum(len(blocks.packed) for blocks in parts) == outputs
        if not is_whole or any(blocks.packed.shape[1:] != shape for blocks in parts):
            return None  # the parameter is multiplied transposed, too
        zero_points = [blocks.zero_points for blocks in parts if blocks.zero_points is not None]
        return BlockArrays(
            np.concatenate([blocks.packed for blocks in parts]),
            np.concatenate([blocks.scales for blocks in parts]),
            np.concatenate(zero_points) if zero_points else None,
        )

    def inputs_of(self, names: Iterable[str]) -> ColumnInputs | None:
        """Return the statistics of a matrix's inputs; None if unknown."""
        return next((self.inputs[name] for name in names if name in self.inputs), None)


def plan_of_model(default: Format, traced: TracedModel) -> QuantizationPlan:
    """Return a plan with one format for a model's linear layers, and for the matrices that features add."""
    called = [site for site in traced.sites if site.calls]  # a router that casts its weight has no calls
    plan = QuantizationPlan(default, layers={name for site in called for name in _names(traced, site)})
    for with_formats in parts("weight formats", traced.operators):
        plan = with_formats(plan, traced)
    return plan


def with_kept(plan: QuantizationPlan, layers: StoredLayers, block_size: int | None, level: int) -> QuantizationPlan:
    """Return a plan that keeps the integers of a base's checkpoint where blocks can hold them."""
    own: dict[str, Format | None] = {}
    kept: dict[str, KeptWeight] = {}
    reasons: dict[str, str] = {}
    for site, found in layers.forms(block_size, level):
        for name in _names(layers.exported, site):
            if isinstance(found, str):
                reasons[name] = found
            else:
                own[name], kept[name] = found.form, found
    return dataclasses.replace(plan, by_matrix={**plan.by_matrix, **own}, kept=kept, reasons=reasons)


def kept_plan(default: Blocks, layers: StoredLayers, block_size: int | None) -> QuantizationPlan:
    """Return a plan that quantizes what a base's checkpoint quantizes, and keeps its integers where it can."""
    sites = [site for site in layers.exported.sites if site.path in layers.stored]
    names = {name for site in sites for name in _names(layers.exported, site)}
    plan = QuantizationPlan(default, layers=names, kind=KEPT)
    for with_formats in parts("weight formats", layers.exported.operators):
        plan = with_formats(plan, layers.exported)
    stacks = layers.stacks & (plan.layers or set())
    plan = with_kept(dataclasses.replace(plan, layers=names | stacks), layers, block_size, default.accuracy_level)
    return dataclasses.replace(plan, reasons={**plan.reasons, **dict.fromkeys(stacks, "it stacks several matrices")})


def _names(traced: TracedModel, site: LinearSite) -> tuple[str, ...]:
    return (*weight_names(traced, site), f"{site.path}.weight")


def weight_names(traced: TracedModel, site: LinearSite) -> tuple[str, ...]:
    """Return the names of a layer's weight in a plan."""
    return traced.tree.names_of(site.weight) or (f"{site.path}.weight",)


class Counts(NamedTuple):
    """Counts of quantized matrices."""

    multiplications: int  # nodes that multiply with quantized values
    lookups: int  # nodes that look up rows of them
    values: int  # values of the multiplied matrices
    integer_bits: int  # bits of their integers
    stored_bits: int  # bits including scales, zero points and padding

    @classmethod
    def of(cls, matrices: Iterable[tuple[Format, int, int, int]]) -> Counts:
        """Count matrices, given by format, inputs, outputs and original bits per value; no nodes."""
        values = integers = stored = 0
        for form, inputs, outputs, float_bits in matrices:
            values += inputs * outputs
            integers += inputs * outputs * form.bits
            stored += form.stored_bits(inputs, outputs, float_bits)
        return cls(0, 0, values, integers, stored)


def quantized_weights(plan: QuantizationPlan, log: PassLog, precision: str) -> QuantizedWeights:
    """Describe the quantized weights of all models of an export for its manifest."""
    counts = log.summaries(Counts)
    total = Counts(*(sum(numbers) for numbers in zip(*counts, strict=True)))
    form = plan.default
    blocks = form if isinstance(form, Blocks) else None
    return QuantizedWeights(
        kind=(plan.kind if plan.kept else None) or (DYNAMIC if blocks is None else f"int{blocks.bits}"),
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
            name: LayerFormat(
                "float" if own is None else str(own), plan.gains.get(name), plan.reasons.get(name), _inexact(own)
            )
            for name, own in sorted({**dict.fromkeys(plan.reasons, form), **plan.by_matrix}.items())
            if own != form or name in plan.reasons
        },
        exact_on=EXACT_SUMS if blocks is None and not plan.kept else None,
        digests=plan.digests,
        needs_folding=precision == "fp32"
        and any(isinstance(own, Blocks) and own.scale_bits == 16 for own in (form, *plan.by_matrix.values())),
    )


def _inexact(form: Format | None) -> int | None:
    """Return the size of blocks that ONNX Runtime multiplies one row by otherwise than several; None for others."""
    if not isinstance(form, Blocks) or form.block_size <= WIDEST_EXACT[form.bits]:
        return None
    return form.block_size
