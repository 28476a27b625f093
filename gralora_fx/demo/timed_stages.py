"""Stages of the demonstration: each named when it begins, and timed; figures as tables on a console and in a report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

from gralora_fx.progress.console import Heartbeat

Rows: TypeAlias = Sequence[tuple[str, str]]


class Stages:
    """The stages of one model.

    Attributes:
        console: Where they are named.
        seconds: How long each took, by name, in order.
    """

    def __init__(self, console: Console, heartbeat: Heartbeat) -> None:
        """Begin.

        Args:
            console: Where to name stages.
            heartbeat: Says how long the running one takes.
        """
        self.console, self._heartbeat = console, heartbeat
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name a stage and time the block.

        Args:
            name: Its name.
        """
        self.console.print(f"[bold]{name}[/bold]")
        self._heartbeat.shown()
        self._heartbeat.begin(name)
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin
        self._heartbeat.end(name)

    def rows(self) -> Rows:
        """The seconds of each stage and of all, for a table."""
        rows = [(f"seconds: {stage}", f"{value:.1f}") for stage, value in self.seconds.items()]
        return [*rows, ("seconds: all", f"{sum(self.seconds.values()):.1f}")]


def table(title: str, rows: Rows) -> Table:
    """Figures for a console.

    Args:
        title: Above the table.
        rows: A name and a value each.
    """
    shown = Table("what", "value", title=title)
    for row in rows:
        shown.add_row(*row)
    return shown


def write_report(tables: Mapping[str, Rows], path: Path) -> None:
    """Write figures as Markdown, and the curve of the loss below them.

    Args:
        tables: The rows of each, by title.
        path: The file.
    """
    lines: list[str] = []
    for title, rows in tables.items():
        lines += [
            f"# {title}",
            "",
            "| what | value |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
        ]
    path.write_text("\n".join([*lines, "![loss](loss.png)", ""]), encoding="utf-8")
