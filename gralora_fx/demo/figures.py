"""Figures and answers of the demonstration: as tables on a console and in a report, and losses as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.table import Table

from gralora_fx.demo.timed_stages import Rows

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
