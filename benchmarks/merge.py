"""Folding an adapter into one large linear layer: time and peak memory, compared with PEFT's two ways."""

from __future__ import annotations

from typing import Any

import peft
import torch

from benchmarks.harness import Case, Claim, Report, Table, measure, peak_allocation, progress
from benchmarks.models import LAYER, OneLinear
from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace

SIZE = 4096


def adapter_options(r: int, k: int, hybrid_r: int) -> dict[str, Any]:
    """Return options of an adapter with random values, for PEFT's configuration and ours."""
    return {"r": r, "gralora_k": k, "hybrid_r": hybrid_r, "target_modules": [LAYER], "init_weights": False}


def run(iterations: int = 30) -> Report:
    """Compare `merge_adapter` and `merge_and_unload` with PEFT's, plain and hybrid."""
    report = Report("merge", f"merge: one {SIZE}x{SIZE} linear layer, fp32")
    for r, k, hybrid_r in ((64, 4, 0), (32, 4, 32)):
        label = f"r={r} k={k}" + (f" hybrid_r={hybrid_r}" if hybrid_r else "")
        progress(f"merge, {label}")
        _compare(report, label, adapter_options(r, k, hybrid_r), block=(SIZE // k) ** 2 * 4, iterations=iterations)
    report.notes.append(
        "ours merge_adapter leaves the base's weight for a bit-exact unmerge and writes beside it, into the buffer of "
        "the merge before; PEFT's has no backup. Peak temporary: what torch allocates during the call"
    )
    return report


def _compare(report: Report, label: str, options: dict[str, Any], *, block: int, iterations: int) -> None:
    cases = [_peft_merge(options), _peft_unload(options), _our_merge(options), _our_unload(options)]
    names = [case.name for case in cases]
    with torch.no_grad():
        timings = measure(cases, iterations=iterations)
        peaks = {case.name: _peak(case) for case in cases}
    theirs, ours = timings.best(names[:2]), timings.best(names[2:])
    rows = [timings.row(name, ours) | {"peak temporary MiB": peaks[name] / 2**20} for name in names]
    report.tables.append(Table(f"{label}; one block is {block / 2**20:g} MiB", rows))
    ratio = timings.ratio(theirs, ours)
    report.claims += [
        Claim(f"{label}: {theirs} / {ours}, ratio of medians", ratio.of_medians, at_least=15),
        Claim(f"{label}: the same, median of pairwise ratios", ratio.median_of_pairs, at_least=15),
        Claim(f"{label}: temporary of our folds, in blocks", max(peaks[n] for n in names[2:]) / block, at_most=1),
    ]


def _peak(case: Case[Any]) -> int:
    """Return the peak memory of the second run; the first allocates the buffer that is kept."""
    state = case.setup()
    case.run(state)
    state = case.reset(state)
    return peak_allocation(lambda: case.run(state))


def _peft_merge(options: dict[str, Any]) -> Case[Any]:
    def setup() -> Any:
        return peft.get_peft_model(OneLinear(SIZE).eval(), peft.GraloraConfig(**options))

    def unmerge(model: Any) -> Any:
        model.unmerge_adapter()
        return model

    return Case("PEFT merge_adapter", lambda model: model.merge_adapter(), setup, unmerge)


def _peft_unload(options: dict[str, Any]) -> Case[Any]:
    linear = OneLinear(SIZE).proj
    original = linear.weight.detach().clone()

    def wrap(_: Any = None) -> Any:
        linear.weight.data.copy_(original)
        source = OneLinear(1).eval()  # a fresh one around the layer, as PEFT leaves marks on a model
        source.proj = linear
        return peft.get_peft_model(source, peft.GraloraConfig(**options))

    return Case("PEFT merge_and_unload", lambda model: model.merge_and_unload(), wrap, wrap)


def _our_merge(options: dict[str, Any]) -> Case[GraloraModel]:
    def setup() -> GraloraModel:
        return rewrite(trace(OneLinear(SIZE).eval(), {"x": torch.randn(2, SIZE)}), GraloraConfig(**options))

    def unmerge(model: GraloraModel) -> GraloraModel:
        model.unmerge_adapter()
        return model

    return Case("ours merge_adapter", lambda model: model.merge_adapter(), setup, unmerge)


def _our_unload(options: dict[str, Any]) -> Case[GraloraModel]:
    source = OneLinear(SIZE).eval()
    original = source.proj.weight.detach().clone()
    traced = trace(source, {"x": torch.randn(2, SIZE)})

    def wrap(_: GraloraModel | None = None) -> GraloraModel:
        source.proj.weight.data.copy_(original)
        return rewrite(traced, GraloraConfig(**options))

    return Case("ours merge_and_unload", lambda model: model.merge_and_unload(), wrap, wrap)
