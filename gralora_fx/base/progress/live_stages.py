"""Stages on a terminal, live; as occasional lines elsewhere."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task

from gralora_fx.base.progress.stages import displayed, running, timed

FIRST, SILENCE = 5.0, 15.0  # seconds of work before the first line of a log, and between its lines
_POLL = 0.5  # seconds between two checks for news


@contextmanager
def live_stages(console: Console | None, silence: float | None) -> Iterator[None]:
    """Show this thread's stages: each with its time and their total on a terminal, news now and then elsewhere."""
    # the current stderr; in a notebook it is a stream like any other
    console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True, force_jupyter=False)
    texts = "{task.description:<10}", "{task.elapsed:>8.1f} s"
    columns = SpinnerColumn(finished_text=" "), *texts, _Bar(bar_width=10), _Counts()
    progress, ended = Progress(*columns, console=console, redirect_stdout=False), threading.Event()
    began, token = progress.get_time(), displayed.set(progress)

    def print_lines() -> None:
        wait = FIRST if silence is None else silence
        while not ended.wait(wait):
            wait = print_news(progress, SILENCE if silence is None else silence)

    printing = threading.Thread(target=print_lines, daemon=True)
    if not console.is_terminal:
        printing.start()
    try:
        yield
        if console.is_terminal and sum(task.fields["is_outermost"] for task in progress.tasks) > 1:
            with timed("total"):
                progress.tasks[-1].start_time = began
    finally:
        displayed.reset(token)
        ended.set()
        if console.is_terminal:
            progress.stop()
        else:
            printing.join()


def print_news(progress: Progress, silence: float) -> float:
    """Print a line if the innermost stage has news; return the seconds until the next may come."""
    for task in running(progress)[-1:]:
        if task.completed > task.fields["said"]:
            progress.update(task.id, said=task.completed)
            counts = f": {counts_of(task)}" if task.total else " ..."
            progress.console.print(f"{task.description}{counts}", markup=False)
            return silence
    return min(_POLL, silence)


def counts_of(task: Task) -> str:
    """Return a counted stage's progress and remaining time, such as `120/210 matrices, about 20 s left`."""
    parts = [f"{task.completed}/{task.total} {task.fields['unit']}".rstrip(), task.fields["detail"]]
    if task.total and task.completed and task.elapsed and task.elapsed >= 1:
        seconds = task.elapsed / task.completed * (task.total - task.completed)
        step = 1 if seconds < 10 else 5
        rounded = f"{max(step, round(seconds / step) * step)} s" if seconds < 90 else f"{round(seconds / 60)} min"
        parts.append(f"about {rounded} left")
    return ", ".join(filter(None, parts))


class _Counts(ProgressColumn):
    def render(self, task: Task) -> RenderableType:
        return counts_of(task) if task.total else ""


class _Bar(BarColumn):
    def render(self, task: Task) -> RenderableType:  # type: ignore[override]
        return super().render(task) if task.total else ""
