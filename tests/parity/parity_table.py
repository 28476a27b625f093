"""The table at the end of a run: architectures by what was compared, passed of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

PROPERTY = "parity"


def print_table(terminalreporter: Any) -> None:
    """Write the table of a run."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    if lines := table(report for report in reports if getattr(report, "when", "") == "call"):
        terminalreporter.section("the same as PEFT")
        for line in lines:
            terminalreporter.line(line)


def recorded(reports: Iterable[Any]) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Count how often each (architecture, aspect) passed, and how often it was compared."""
    passed: Counter[tuple[str, str]] = Counter()
    compared: Counter[tuple[str, str]] = Counter()
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == PROPERTY:
                architecture, aspect, is_equal = value
                compared[architecture, aspect] += 1
                passed[architecture, aspect] += bool(is_equal)
    return passed, compared


def table(reports: Iterable[Any]) -> list[str]:
    """Return the lines of the table; none where nothing was compared."""
    passed, compared = recorded(reports)
    if not compared:
        return []
    architectures = list(dict.fromkeys(architecture for architecture, _ in compared))
    aspects = list(dict.fromkeys(aspect for _, aspect in compared))
    rows = [["", *aspects]]
    for name in [*sorted(architectures), "all"]:
        keys = [[(a, aspect) for a in architectures if name in (a, "all")] for aspect in aspects]
        rows.append([name, *(f"{sum(passed[k] for k in ks)}/{sum(compared[k] for k in ks)}" for ks in keys)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    first, *others = widths
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
