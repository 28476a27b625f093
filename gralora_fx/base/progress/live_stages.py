"""Live stages on a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

from gralora_fx.base.progress.stages import RunningStage, displayed_by


class LiveStages:
    """Stages on a terminal: each with its time, progress of the running one, and the total of several at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begin = time.perf_counter()
        self._outermost = 0
        self._tasks: list[tuple[RunningStage, TaskID]] = []
        columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description:<10}"), _Seconds(), _Bar(), _Count())
        self._live = Progress(*columns, console=console, redirect_stdout=False)
        self._shown = displayed_by(self)

    def __enter__(self) -> None:
        self._shown.__enter__()

    def __exit__(self, kind: object, *_: object) -> None:
        """Stop; show the total of several stages unless an error ended the work."""
        self._shown.__exit__(None, None, None)
        self._live.stop()
        if self._outermost > 1 and kind is None:
            width = max([10, *(len(task.description) for task in self._live.tasks)])
            self._console.print(f"  {'total':<{width}} {time.perf_counter() - self._begin:>8.1f} s")

    def begin(self, stage: str) -> None:
        """Show the start of a stage."""
        self._live.start()
        self._outermost += not self._tasks
        running = RunningStage(stage, time.monotonic())
        self._tasks.append((running, self._live.add_task(stage, total=None, running=running)))

    def end(self, stage: str) -> None:
        """Show the end of a stage and those within it."""
        names = [running.name for running, _ in self._tasks]
        if stage not in names:
            return
        first = len(names) - 1 - names[::-1].index(stage)
        for running, task in self._tasks[first:]:
            if running.total:  # a counted stage's time is part of the enclosing stage's
                self._live.remove_task(task)
            else:
                self._live.update(task, total=1, completed=1)
        del self._tasks[first:]

    def count(self, stage: str, done: int, total: int, unit: str = "", detail: str = "") -> None:
        """Show a stage's progress."""
        for running, _ in self._tasks:
            if running.name == stage:
                running.done, running.total, running.unit, running.detail = done, total, unit, detail


class _Seconds(ProgressColumn):
    """A stage's seconds, final or so far."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        return Text(f"{seconds or 0.0:>8.1f} s")


class _Bar(ProgressColumn):
    """A counted stage's progress as a bar."""

    def render(self, task: Task) -> ProgressBar | Text:
        stage: RunningStage = task.fields["running"]
        return ProgressBar(stage.total, stage.done, width=10) if stage.total else Text("")


class _Count(ProgressColumn):
    """A counted stage's progress in words."""

    def render(self, task: Task) -> Text:
        stage: RunningStage = task.fields["running"]
        return Text(stage.counts(time.monotonic()) if stage.total else "")
