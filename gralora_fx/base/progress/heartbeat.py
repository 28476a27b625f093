"""Stages of a log: the running one as a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from rich.console import Console

from gralora_fx.base.progress.stages import displayed_by

FIRST, SILENCE = 5.0, 15.0  # seconds of work before the first line of a log, and between its lines
_POLL = 0.5  # seconds until a log asks again whether there is news
_LEAST = 1.0  # seconds of a stage that say how long it will take


def time_left(seconds: float) -> str:
    """Say how many seconds are left, in words such as `about 20 s left`."""
    if seconds >= 90:
        return f"about {round(seconds / 60)} min left"
    step = 1 if seconds < 10 else 5
    return f"about {max(step, round(seconds / step) * step)} s left"


@dataclass
class RunningStage:
    """A stage that is running."""

    name: str
    began: float  # when it did, by the clock
    done: int = 0  # how many things are done
    total: int = 0  # how many there are; 0 where they are not counted
    unit: str = ""  # what they are
    detail: str = ""  # what else is news
    has_news: bool = True  # whether something was not shown yet

    def counts(self, now: float) -> str:
        """How far it is, and how long it will take."""
        parts = [f"{self.done}/{self.total} {self.unit}".rstrip()]
        parts += [self.detail] if self.detail else []
        elapsed = now - self.began
        if self.done and elapsed >= _LEAST:
            parts.append(time_left(elapsed / self.done * (self.total - self.done)))
        return ", ".join(parts)

    def line(self, now: float) -> str:
        """Return what a log says of it."""
        return f"{self.name}: {self.counts(now)}" if self.total else f"{self.name} ..."


class Heartbeat:
    """Prints now and then what is going on, to a console that is not a terminal: one line at a time, with news alone.

    A context manager and a display of stages (`progress.stages`): lines come while the block runs, the first after a
    few seconds. On a terminal it prints nothing, as live displays do that there.
    """

    def __init__(
        self,
        console: Console,
        *,
        first: float | None = None,
        silence: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin outside any stage.

        Args:
            console: Where to print.
            first: Seconds until the first line may come; None for `FIRST`.
            silence: The least seconds between two lines; None for `SILENCE`.
            clock: Gives the time in seconds.
        """
        self._console, self._clock = console, clock
        self._silence = SILENCE if silence is None else silence
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stages: list[RunningStage] = []
        self._due = clock() + (FIRST if first is None else first)
        self._shown: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> Heartbeat:
        """Show the stages of this thread, unless the console is a terminal."""
        if not self._console.is_terminal:
            self._shown = displayed_by(self)
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
        self._shown.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._shown.__exit__(None, None, None)
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def begin(self, stage: str) -> None:
        """Enter a stage, within the one that is running."""
        with self._lock:
            self._stages.append(RunningStage(stage, self._clock()))

    def end(self, stage: str) -> None:
        """Leave a stage, and those within it that an error ended."""
        with self._lock:
            names = [running.name for running in self._stages]
            if stage in names:
                del self._stages[len(names) - 1 - names[::-1].index(stage) :]

    def count(self, stage: str, done: int, total: int, unit: str = "", detail: str = "") -> None:
        """Note how far a stage is (see `progress.stages.Display`)."""
        with self._lock:
            for running in self._stages:
                if running.name == stage:
                    is_new = done > running.done or not running.total
                    running.done, running.total, running.unit, running.detail = done, total, unit, detail
                    running.has_news = running.has_news or is_new

    def shown(self) -> None:
        """Note that something else was just printed."""
        with self._lock:
            self._due = self._clock() + self._silence

    def beat(self) -> float:
        """Print a line if one is due and there is news; returns the seconds until the next can be."""
        with self._lock:
            now = self._clock()
            if self._due > now:
                return self._due - now
            if not self._stages or not self._stages[-1].has_news:
                return min(_POLL, self._silence)
            self._stages[-1].has_news = False
            line = self._stages[-1].line(now)
            self._due = now + self._silence
        self._console.print(line, markup=False)
        return self._silence

    def _run(self) -> None:
        wait = self.beat()
        while not self._ended.wait(wait):
            wait = self.beat()
