"""The encoders that pass: every encoder class of transformers, tiny and random, from trace to a verified export.

Each is built from its default configuration with every size set small, run on the inputs of its task, traced, rewritten
with adapters on all linear layers, exported, and compared with the model on other sizes. Each runs in its own process
with a time limit. A class that cannot be built or run this way does not count in the shares, and is listed with the
reason.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.apart import Note, Outcome, survey
from benchmarks.harness import Claim, Report, Table
from tests.architectures.encoder_check import STAGES, Checked, check_encoder
from tests.architectures.tiny_encoders import Listed, encoder_classes, skipped_types, tiny_encoder

Found = Outcome[Checked]
# by stage: why a class that fails there says nothing about an export
_LEFT_OUT = {
    "build": "it does not build tiny, or needs a package that is not installed",
    "run": "the tiny model itself does not run on the inputs that its task gives",
}


def run(only: Sequence[str] = (), workers: int = 2) -> Report:
    """Check every encoder class, or those in `only`, with `workers` concurrent checks."""
    listed = {entry.name: entry for entry in encoder_classes()}
    work = partial(_check, {name: entry.task for name, entry in listed.items()})
    found = survey(listed, only, work, _verdict, kind="encoder class", module=__name__, at_once=workers)
    return _report(found, listed)


def _check(tasks: dict[str, str], name: str, note: Note) -> Checked:
    note("build")
    model = tiny_encoder(name)
    task = None if tasks[name] == "audio-classification" else tasks[name]
    with tempfile.TemporaryDirectory() as directory:
        return check_encoder(model, task, Path(directory) / "export", note)


def _verdict(result: Found) -> str:
    """Describe how far a class got, and why not further."""
    checked = result.result
    if checked is None:
        return f"{result.stage}: {result.reason}"
    if not checked.holds:
        return f"hold: {checked.difference}"
    plain = "".join(f"; not fused: {why}" for why in sorted(set(checked.plain.values())))
    return f"holds, {checked.fused} layers fused{plain}"


def _passed(result: Found, stage: str) -> bool:
    """Return whether a class passed a stage."""
    if result.result is not None:
        return stage != "hold" or result.result.holds
    return STAGES.index(stage) < STAGES.index(result.stage or STAGES[0])


def _is_fused(result: Found) -> bool:
    return result.result is not None and result.result.fused > 0 and not result.result.plain


def _has_attention(result: Found) -> bool:
    """Return whether a passing class has attention, through transformers' interface."""
    checked = result.result
    return checked is not None and checked.holds and checked.uses_interface and bool(checked.fused or checked.plain)


def _report(entries: Sequence[Found], listed: dict[str, Listed]) -> Report:
    tasks = dict.fromkeys(listed[result.name].task for result in entries)
    rows = [_row(task, [r for r in entries if listed[r.name].task == task]) for task in tasks]
    rows.append(_row("all", entries))
    running = [result for result in entries if _passed(result, "run")]
    holding = [result for result in entries if _passed(result, "hold")]
    attending = [result for result in holding if _has_attention(result)]
    fused = [result for result in attending if _is_fused(result)]
    title = (
        f"encoders: {len(holding)} of {len(running)} classes that run hold; {len(fused)} of {len(attending)} that use "
        "transformers' attention interface have every layer fused"
    )
    report = Report("encoders", title, [Table("every encoder class, by the mapping that lists it", rows)])
    failures = [
        {"class": r.name, "task": listed[r.name].task, "stage": r.stage or "build", "reason": _verdict(r)}
        for r in entries
        if _passed(r, "run") and not _passed(r, "hold")
    ]
    left_out = [
        {"class": r.name, "task": listed[r.name].task, "why": _LEFT_OUT[r.stage or "build"], "reason": r.reason}
        for r in entries
        if not _passed(r, "run")
    ]
    report.tables += [Table("classes left out", left_out)] if left_out else []
    report.tables += [Table("classes that do not hold", failures)] if failures else []
    plain = [
        {
            "class": r.name,
            "interface": r.result.uses_interface,
            "reason": "; ".join(sorted(set(r.result.plain.values()))),
        }
        for r in holding
        if r.result is not None and r.result.plain
    ]
    report.tables += [Table("classes with attention that is not fused", plain)] if plain else []
    report.notes += [f"left out, {reason}: {len(kinds)} types" for reason, kinds in skipped_types().items()]
    checks = sum(r.result.nan_checks for r in holding if r.result is not None)
    report.claims = [
        Claim("share of the classes that run that hold", len(holding) / max(len(running), 1), at_least=0.9),
        Claim("share of those with attention by the interface, all fused", _share(fused, attending), at_least=0.95),
        Claim("checks for values that are not numbers", float(checks), at_most=0),
    ]
    return report


def _share(some: Sequence[Found], all_: Sequence[Found]) -> float:
    return len(some) / len(all_) if all_ else 1.0


def _row(task: str, entries: Sequence[Found]) -> dict[str, Any]:
    counts = {stage: sum(_passed(result, stage) for result in entries) for stage in STAGES}
    attending = [result for result in entries if _has_attention(result)]
    fused = f"{sum(map(_is_fused, attending))} of {len(attending)}"
    seconds = sum(result.seconds for result in entries)
    return {"mapping": task, "classes": len(entries), **counts, "fused": fused, "seconds": seconds}
