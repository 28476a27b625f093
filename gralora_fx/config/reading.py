"""Configuration fields as other programs write them, in the terms of `GraloraConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gralora_fx.config.checks import check_integer
from gralora_fx.errors import warn_caller

ALL_LINEAR = "all-linear"


def from_paper(values: Mapping[str, Any], gralora_alpha: float, origin: str) -> dict[str, Any]:
    """The paper's own fields in PEFT's terms: its `r` counts `hybrid_r` in, its scale is `gralora_alpha / r`."""
    total, hybrid = values.get("r", 32), values.get("hybrid_r") or 0
    check_integer("r", total, 1)
    check_integer("hybrid_r", hybrid, 0)
    warn_caller(
        f"{origin} is in the format of the paper's own code: read as r={total - hybrid}, hybrid_r={hybrid}, "
        f"alpha={gralora_alpha}, so that the scale is {gralora_alpha}/{total}"
    )
    return {**values, "r": total - hybrid, "hybrid_r": hybrid, "alpha": gralora_alpha}


def as_peft_reads(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`values` without what PEFT ignores at run time, and a sentence for each thing left out."""
    kept, dropped = dict(values), []
    targets, layers, pattern = (kept.get(name) for name in ("target_modules", "layers_to_transform", "layers_pattern"))
    is_regex = isinstance(targets, str) and targets.lower() != ALL_LINEAR
    if is_regex and layers not in (None, []):
        dropped.append(f"layers_to_transform={layers!r} is ignored, as PEFT ignores it beside a regular expression")
        kept["layers_to_transform"] = None
    if pattern and kept.get("layers_to_transform") in (None, []):
        dropped.append(f"layers_pattern={pattern!r} is ignored, as PEFT ignores it without layers_to_transform")
        kept["layers_pattern"] = None
    dropout = kept.get("gralora_dropout", 0.0)
    if isinstance(dropout, (int, float)) and dropout < 0:
        dropped.append(f"gralora_dropout={dropout!r} is read as 0, as PEFT reads it")
        kept["gralora_dropout"] = 0.0
    return kept, dropped
