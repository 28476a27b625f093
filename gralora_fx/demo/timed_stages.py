"""Stages of the demonstration: each named when it begins, shown while it runs, and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeAlias

from rich.console import Console

from gralora_fx.base.progress.console import StageProgress
from gralora_fx.base.progress.stages import timed

SILENCE = 10.0  # the least seconds between two lines of a log; a step of training may come on top
Rows: TypeAlias = Sequence[tuple[str, str]]


class Stages:
    """The stages of one model.

    Attributes:
        console: Where they are shown.
        seconds: How long each took, by name, in order.
    """

    def __init__(self, console: Console) -> None:
        """Begin."""
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name a stage, show how far it is, and time the block."""
        named: AbstractContextManager[None] = timed(name)
        if not self.console.is_terminal:  # a line names it at once, and others follow if there is news within it
            self.console.print(f"{name} ...", markup=False)
            named = nullcontext()
        begin = time.perf_counter()
        with StageProgress(self.console, silence=SILENCE), named:
            yield
        self.seconds[name] = time.perf_counter() - begin

    def wrote(self, path: Path, what: str) -> None:
        """Say that there is something to look at."""
        self.console.print(f"wrote {path}: {what}", markup=False)

    def rows(self) -> Rows:
        """The seconds of each stage and of all, for a table."""
        rows = [(f"seconds: {stage}", f"{value:.1f}") for stage, value in self.seconds.items()]
        return [*rows, ("seconds: all", f"{sum(self.seconds.values()):.1f}")]
