"""The models that read images and hold: every such class of transformers, tiny and random, from trace to answers.

Each is exported with verification, and its greedy tokens after prompts with one image, with two and beside a text are
compared with those of transformers' own generation. Each runs in its own process with a time limit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.apart import Outcome, survey
from benchmarks.harness import Claim, Report, Table
from tests.architectures.image_check import CheckedImages, check_images
from tests.architectures.image_prompts import image_classes, tiny_image_model

Found = Outcome[CheckedImages]
WHOLE, ALONE, REFUSED = "whole", "the decoder alone", "refused"
_POSITIONS = 512  # of a text: prompts of tiny models have up to a hundred tokens


def run(only: Sequence[str] = (), workers: int = 2) -> Report:
    """Check every model, or the classes in `only`, with `workers` concurrent checks."""
    kind = "model for images and text"
    return _report(survey(image_classes(), only, _check, _shown, kind=kind, module=__name__, at_once=workers))


def _check(name: str, note: Callable[[str], None]) -> CheckedImages:
    note("check")
    with tempfile.TemporaryDirectory() as directory:
        return check_images(tiny_image_model(name, max_position_embeddings=_POSITIONS), Path(directory) / "export")


def _shown(found: Found) -> str:
    return ". ".join(_verdict(found))


def _verdict(found: Found) -> tuple[str, str]:
    """Describe how much of a model is exported, and why no more."""
    if (checked := found.result) is None:
        return REFUSED, found.reason
    if checked.answers:
        return REFUSED, f"its answers differ: {checked.answers}"
    return (ALONE, checked.reason) if checked.reason else (WHOLE, "")


def _report(found: Sequence[Found]) -> Report:
    rows = []
    for each in found:
        verdict, why = _verdict(each)
        checked = each.result
        rows.append(
            {
                "architecture": each.name,
                "result": verdict,
                "why": why,
                "takes": "" if checked is None else ", ".join(checked.takes),
                "rows of their own lengths": "" if checked is None else checked.one_length or "yes",
                "seconds": each.seconds,
            }
        )
    whole = sum(row["result"] == WHOLE for row in rows)
    report = Report("image_models", f"images: {whole} of {len(found)} whole", [Table("images and text to text", rows)])
    report.claims = [Claim("models that are exported whole", float(whole), at_least=50)]
    return report
