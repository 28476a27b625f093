"""A sign of life in a log: a line every few seconds while a stage shows nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.console import Console

SILENCE = 5.0  # seconds; half of the longest that a log should stay silent, as a busy interpreter is late


class Heartbeat:
    """Prints which stage is running, and for how long, whenever a console that is no terminal has been silent.

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
