"""Stages of the demonstration, shown and timed, and its figures: on a console, in a report, and as a picture."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

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


_WINDOW = 10  # steps whose mean is drawn


@dataclass(frozen=True)
class DemoPart:
    """What came of one model.

    Attributes:
        title: What was done.
        rows: A name and a value of each figure.
        asked: Title of the answers.
        header: Names of their columns.
        answers: A row for each.
        picture: Its losses, beside the report or below it.
    """

    title: str
    rows: Rows
    asked: str
    header: Sequence[str]
    answers: Sequence[Sequence[str]]
    picture: Path

    def tables(self) -> tuple[Table, Table]:
        """Answers and figures for a console."""
        answers, figures = Table(*self.header, title=self.asked), Table("what", "value", title=self.title)
        for table, rows in ((answers, self.answers), (figures, self.rows)):
            for row in rows:
                table.add_row(*row)
        return answers, figures


def write_report(parts: Sequence[DemoPart], path: Path) -> None:
    """Write figures, answers and pictures as Markdown."""
    lines: list[str] = []
    for part in parts:
        figures = _markdown(("what", "value"), part.rows)
        answers = _markdown(part.header, part.answers)
        picture = f"![loss]({part.picture.relative_to(path.parent).as_posix()})"
        lines += [f"# {part.title}", "", *figures, "", f"## {part.asked}", "", *answers, "", picture, ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def draw_losses(losses: Sequence[float], path: Path) -> None:
    """Draw the loss of every step."""
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    smooth = [fmean(losses[max(0, i - _WINDOW + 1) : i + 1]) for i in range(len(losses))]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(losses, alpha=0.3, label="each step")
    axes.plot(smooth, label=f"mean of {_WINDOW} steps")
    axes.set(xlabel="step", ylabel="cross entropy", title="Training loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]
