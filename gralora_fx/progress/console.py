"""Progress on a console: stages from log records, live on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

SILENCE = 5.0  # seconds; half of the longest that a log should stay silent, as a busy interpreter is late


class Heartbeat:
    """Prints which stage is running, and for how long, whenever a console that is not a terminal has been silent.

    A context manager: lines come while the block runs. On a terminal it prints nothing, as live displays do that there.
    """

    def __init__(
        self, console: Console, *, silence: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin in the stage `working`.

        Args:
            console: Where to print.
            silence: Seconds without a line after which one is due; None for `SILENCE`.
            clock: Gives the time in seconds.
        """
        self._console, self._clock = console, clock
        self._silence = SILENCE if silence is None else silence
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stages: list[tuple[str, float]] = [("working", clock())]
        self._last = clock()

    def __enter__(self) -> Heartbeat:
        """Start, unless the console is a terminal."""
        if not self._console.is_terminal:
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def begin(self, stage: str) -> None:
        """Enter a stage, within the one that is running."""
        with self._lock:
            self._stages.append((stage, self._clock()))

    def end(self, stage: str) -> None:
        """Leave a stage, and those within it that an error ended."""
        with self._lock:
            names = [name for name, _ in self._stages]
            if stage in names[1:]:
                del self._stages[len(names) - 1 - names[::-1].index(stage) :]

    def shown(self) -> None:
        """Note that something else was just printed."""
        with self._lock:
            self._last = self._clock()

    def beat(self) -> float:
        """Print a line if one is due; returns the seconds until the next can be."""
        with self._lock:
            now = self._clock()
            due = self._last + self._silence - now
            if due > 0:
                return due
            stage, begin = self._stages[-1]
            self._last = now
        self._console.print(f"{stage:<12}{now - begin:>8.1f} s so far", markup=False)
        return self._silence

    def _run(self) -> None:
        wait = self._silence
        while not self._ended.wait(wait):
            wait = self.beat()


class StageProgress(logging.Handler):
    """Shows each stage with its time on stderr, and the total at the end; other log records as they come.

    Where stderr is not a terminal, a stage that takes long shows its time so far every few seconds.

    A context manager: it listens to the package's log while the block runs.
    """

    def __init__(self) -> None:
        """Begin to count the time."""
        super().__init__(logging.INFO)
        # the current stderr, so that the display goes on while the libraries' output is suppressed
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._begin = time.perf_counter()
        self._has_stages = False
        self._heartbeat = Heartbeat(self._console)
        self._tasks: dict[str, TaskID] = {}
        columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description:<10}"), _Seconds())
        self._live = Progress(*columns, console=self._console, redirect_stdout=False)

    def __enter__(self) -> StageProgress:
        """Listen."""
        logger = logging.getLogger("gralora_fx")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        self._heartbeat.__enter__()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Stop listening, and show the total unless an error ended the work."""
        logging.getLogger("gralora_fx").removeHandler(self)
        self._heartbeat.__exit__()
        if self._console.is_terminal:
            self._live.stop()
        if self._has_stages and kind is None:
            self._console.print(f"{'  total' if self._console.is_terminal else 'total':<12}{self._elapsed():>8.1f} s")

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record."""
        name, seconds = getattr(record, "stage", None), getattr(record, "seconds", None)
        if name is None:
            self._console.print(record.getMessage(), markup=False)
            self._heartbeat.shown()
            return
        self._has_stages = True
        if not self._console.is_terminal:
            if seconds is None:
                self._heartbeat.begin(name)
            else:
                self._heartbeat.end(name)
                self._console.print(f"{name:<12}{seconds:>8.1f} s")
                self._heartbeat.shown()
        elif seconds is None:
            self._live.start()
            self._tasks[name] = self._live.add_task(name, total=1)
        elif (task := self._tasks.pop(name, None)) is not None:
            self._live.update(task, completed=1)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._begin


class _Seconds(ProgressColumn):
    """The seconds of a stage, finished or so far."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        return Text(f"{seconds or 0.0:>8.1f} s")
