"""Choice of an export's formats by measured error within a bit budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gralora_fx.base.progress.stages import counted
from gralora_fx.base.sources.lazy_tensors import raw_values_of
from gralora_fx.core.graph.sites import LinearSite, other_readers
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import first_line
from gralora_fx.exporters.formats import Blocks, Columns
from gralora_fx.exporters.kinds.conversion import Conversion
from gralora_fx.exporters.quantize.block_arrays import BlockArrays
from gralora_fx.exporters.quantize.calibration import Calibration, calibrate
from gralora_fx.exporters.quantize.kept_work import KeptBlocks
from gralora_fx.exporters.quantize.plan import QuantizationPlan, weight_names
from gralora_fx.exporters.quantize.round_in_order import round_in_order
from gralora_fx.exporters.quantize.row_errors import plan_rows
from gralora_fx.exporters.quantize.sensitivity import Sensitivities
from gralora_fx.exporters.verify.cases import Verification
from gralora_fx.exporters.verify.comparable import evaluating
from gralora_fx.format.quantized_weights import WIDEST_EXACT

_ROWS = 2048  # output features of a matrix sampled for its error


@dataclass(frozen=True)
class _Candidate:
    """A matrix of an int4 export, and its loss in two formats."""

    names: tuple[str, ...]  # names of the parameter
    values: int  # number of its values
    forms: tuple[Blocks, Blocks]  # formats of four and of eight bits
    losses: tuple[float, float]  # the loss in each
    stored: tuple[int, int]  # bits of the matrix in each, with scales and zero points
    relative: float  # the expected squared error of the weights in the first, relative to their squares
    is_measured: bool  # whether losses are divergences of the outputs, rather than relative errors

    @property
    def gain(self) -> float:
        """Loss saved by eight bits."""
        return self.losses[0] - self.losses[1]


def choose_formats(conversion: Conversion, verification: Verification) -> QuantizationPlan | None:
    """Return the plan of an export: for int4 and int8-dynamic by measured error, for int8 unchanged.

    A layer's rounding error is weighted by its effect on the outputs (see `sensitivity`). In int4, 8 bits go where they
    save most per additional bit, up to the budget; in int8-dynamic, 16 bits go to the activations whose rounding costs
    most (see `row_errors`). The inputs are every second of a user's texts, texts drawn from a decoder, or random ones.
    """
    plan, traced = conversion.plan, conversion.traced
    if plan is None or (isinstance(plan.default, Blocks) and plan.default.bits != 4):
        return plan
    run = calibrate(conversion, verification)
    if isinstance(plan.default, Columns):
        return _with_rows(plan, conversion, run)
    names = {site.path: weight_names(traced, site) for site in traced.sites}
    rounded_anew = [site for site in traced.sites if site.calls and names[site.path][0] not in plan.kept]
    sites = list({id(site.weight): site for site in rounded_anew}.values())
    tied = other_readers(traced.graph_module, sites)
    has_own = conversion.options.block_size is None
    forms = {site.path: _forms(plan.default, site, bool(tied[site.path]), has_own) for site in sites}
    candidates = [
        _candidate(site, names[site.path], forms[site.path], run.measured)
        for site in counted(sites, "choosing bits", "matrices")
    ]
    bits = conversion.options.mean_bits
    own, gains = _within(_comparable(candidates), bits, _room_beside(plan, traced, bits))
    chosen_by = run.inputs
    if run.problem:
        chosen_by = f"the errors of the weights themselves, as {run.problem}"
    try:
        rounded = _rounded(conversion, run, plan.default, own, names, plan.kept) if run.cases else {}
    except (RuntimeError, NotImplementedError) as error:
        rounded, chosen_by = {}, f"{chosen_by}; weights rounded for inputs that count alike ({first_line(error)})"
    by_matrix = {**plan.by_matrix, **own}
    return dataclasses.replace(plan, by_matrix=by_matrix, gains=gains, chosen_by=chosen_by, rounded=rounded)


def _rounded(
    conversion: Conversion,
    run: Calibration,
    default: Blocks,
    own: Mapping[str, Blocks],
    names: Mapping[str, tuple[str, ...]],
    kept: Collection[str],
) -> Mapping[str, BlockArrays]:
    """Return the blocks of weights rounded by search, by all names of each, from the layers' paths."""
    chosen = {path: (of[0], own.get(of[0], default)) for path, of in names.items() if of[0] not in kept}
    forms = {path: one for path, one in chosen.items() if one[1].rounding == "searched"}
    with evaluating(conversion.model, run.model):
        blocks = round_in_order(run.model, run.cases, forms, conversion.work)
    return KeptBlocks(blocks.work, {name: of for path, of in blocks.results.items() for name in names[path]})


def _with_rows(plan: QuantizationPlan, conversion: Conversion, run: Calibration) -> QuantizationPlan:
    """Return the plan of an export with rounded activations; without measurements if the model cannot be run."""
    if not run.cases:
        return dataclasses.replace(plan, chosen_by=f"nothing, as {run.problem}")
    chosen_by = (
        f"the errors of the layers' own outputs on {run.inputs}, as {run.problem}" if run.problem else run.inputs
    )
    with evaluating(conversion.model, run.model):
        try:
            plan = plan_rows(plan, run.model, run.cases, run.measured)
        except RuntimeError as error:
            chosen_by = f"nothing, as the model was not measured ({first_line(error)})"
    return dataclasses.replace(plan, chosen_by=chosen_by)


def _comparable(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Convert unmeasured candidates' losses, valuing a relative error like the median of the measured ones."""
    costs = [one.losses[0] / one.relative for one in candidates if one.is_measured and one.relative > 0]
    cost = float(np.median(costs)) if costs else 1.0

    def scaled(one: _Candidate) -> _Candidate:
        four, eight = one.losses
        return dataclasses.replace(one, losses=(cost * four, cost * eight))

    return [one if one.is_measured else scaled(one) for one in candidates]


def _room_beside(plan: QuantizationPlan, traced: TracedModel, bits: float) -> float:
    """Return the bits that kept integers leave of their own budget; below zero if they have more."""
    kept = {
        id(site.weight): site.weight.numel() * (bits - plan.kept[name].form.bits)
        for site in traced.sites
        if (name := weight_names(traced, site)[0]) in plan.kept
    }
    return sum(kept.values())


def _within(candidates: Sequence[_Candidate], bits: float, beside: float) -> tuple[dict[str, Blocks], dict[str, float]]:
    """Return the formats, and the loss each saves, by all names of a matrix: 8 bits where they save most per bit.

    `bits` is the mean allowed; `beside` is the room, in bits, that matrices outside the candidates leave.
    """
    room = (bits - 4) * sum(one.values for one in candidates) + beside
    taken = []
    for one in sorted(candidates, key=lambda one: one.gain / (one.stored[1] - one.stored[0]), reverse=True):
        cost = one.values * (one.forms[1].bits - 4)
        if one.gain > 0 and cost <= room:
            taken.append(one)
            room -= cost
    own = {name: one.forms[1] for one in taken for name in one.names}
    return own, {name: one.gain for one in taken for name in one.names}


def _forms(form: Blocks, site: LinearSite, is_table: bool, has_own: bool) -> tuple[Blocks, Blocks]:
    """Return the formats for a layer's weight (see `_Candidate`); a lookup table needs rows of whole blocks."""
    fits = site.in_features >= WIDEST_EXACT[8] and (not is_table or site.in_features % WIDEST_EXACT[8] == 0)
    size = WIDEST_EXACT[8] if has_own and fits else form.block_size
    return form, dataclasses.replace(form, bits=8, block_size=size, rounding="nearest")


def _candidate(
    site: LinearSite, names: tuple[str, ...], forms: tuple[Blocks, Blocks], measured: Sensitivities | None
) -> _Candidate:
    """Return a layer's weight with its loss in each format."""
    values = raw_values_of(site.weight, names[0])
    weight = values.t() if site.kind == "conv1d" else values  # [out, in]
    rows = torch.arange(0, len(weight), max(1, len(weight) // _ROWS))
    sample = weight[rows].to(site.weight.dtype).float()
    known = measured if measured is not None and measured.has_gradients(site.path) else None
    errors = {of: _expected_errors(sample, of) for of in dict.fromkeys(forms)}
    relative = {of: float(error.sum() / sample.square().sum().clamp(min=1e-30)) for of, error in errors.items()}
    losses = relative if known is None else {of: known.loss(site.path, error, rows) for of, error in errors.items()}
    sizes = [of.stored_bits(site.in_features, site.out_features) for of in forms]
    return _Candidate(
        names,
        site.weight.numel(),
        forms,
        (losses[forms[0]], losses[forms[1]]),
        (sizes[0], sizes[1]),
        relative[forms[0]],
        known is not None,
    )


def _expected_errors(weight: Tensor, form: Blocks) -> Tensor:
    """Return expected squared errors of a weight `[out, in]`: a twelfth of the squared step of each block."""
    inputs, missing = weight.shape[1], -weight.shape[1] % form.block_size
    padded = torch.nn.functional.pad(weight, (0, missing)) if missing else weight
    blocks = padded.reshape(len(weight), -1, form.block_size)
    least, largest = blocks.aminmax(dim=2, keepdim=True)
    steps = (largest.clamp(min=0) - least.clamp(max=0)) / (2**form.bits - 1)
    errors: Tensor = (steps.square() / 12).expand_as(blocks).reshape(padded.shape)[:, :inputs]
    return errors
