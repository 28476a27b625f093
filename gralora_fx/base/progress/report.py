"""Reports of finished work: three lines with result, files and usage; details on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from rich.filesize import decimal

from gralora_fx.errors import Message, joined, marked, remedy

DETAILS = remedy("print(report.details)", "-v")
_LONG = 10.0  # minimum seconds of work for naming its longest part
size_of = decimal  # a number of bytes in words, such as `86.2 MB`


@dataclass(frozen=True)
class Invocation:
    """Usage of what was written."""

    python: str  # a line of Python to paste
    command: str = ""  # the words of a shell command; empty if there is none
    arguments: Mapping[str, str] = field(default_factory=dict)  # the command's, by the Python names of its options


@dataclass(frozen=True)
class Summary:
    """The short form of a report."""

    result: str  # the outcome: whether it passed, and by how much
    written: str  # the files written and their size; if nothing was written, what was examined
    usage: Invocation | None = None  # how to use it; None if unknown
    notes: Sequence[str] = ()  # important notes, a few words each
    slowest: str = ""  # the slowest stage, and how to skip it; empty for short work
    comparison: Invocation | None = None  # compares it with the model; None if that was done, or is impossible

    def text(self, words: Callable[[Invocation], str] = attrgetter("python")) -> Message:
        """Return the lines of the short form; `words` renders an invocation."""
        lines = [self.result, self.written, f"every figure: {DETAILS}"]
        if self.comparison is not None:
            lines[0] += f"; not compared with PyTorch, to do so: {words(self.comparison)}"
        if self.usage is not None:
            lines[1:] = [f"{self.written} (every figure: {DETAILS})", f"use it: {words(self.usage)}"]
        if self.notes:
            lines.append(Message(f"note: {marked(joined(self.notes, '; '))}"))
        return joined(filter(None, [*lines, self.slowest]))


class Report:
    """A report that prints as three lines; `details` has the rest."""

    @property
    def summary(self) -> Summary:
        """The short form."""
        raise NotImplementedError

    @property
    def details(self) -> str:
        """The report's full text."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Return the short form: outcome, files, usage and notes."""
        return self.summary.text()


def written(directory: Path, files: Mapping[str, int]) -> str:
    """Describe what was written on one line."""
    return f"wrote {directory}: {size_of(sum(files.values()))} in {len(files)} file{'s' * (len(files) > 1)}"


def written_lines(directory: Path, files: Mapping[str, int]) -> list[str]:
    """Return the written directory's path, and a line for each file."""
    width = max(map(len, files), default=0)
    return [f"wrote {directory}", *(f"  {name:<{width}}{size:>16,} bytes" for name, size in files.items())]


def times(seconds: Mapping[str, float]) -> str:
    """Return the time of every stage on one line."""
    return ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())


def slowest(seconds: Mapping[str, float], stages: Mapping[str, str]) -> Message:
    """Name the slowest stage by its text in `stages`, with a remedy after its colon; empty for short work."""
    total = sum(seconds.values())
    if total < _LONG:
        return Message("")
    stage = max(seconds, key=seconds.__getitem__)
    name, colon, rest = stages.get(stage, stage).partition(": ")
    return Message(f"{name} took {seconds[stage]:.0f} s of {total:.0f} s{colon}{rest}")
