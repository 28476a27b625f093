"""Progress on a console: live on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

from rich.console import Console

from gralora_fx.base.progress import stages
from gralora_fx.base.progress.stages import RunningStage, displayed_by, is_displayed

FIRST, SILENCE = 5.0, 15.0  # seconds of work before the first line of a log, and between its lines
_POLL = 0.5  # seconds between two checks for news


class Heartbeat:
    """Prints occasional progress lines to a console that is not a terminal, only when there is news.

    A context manager and a display of stages (`progress.stages`): lines come while the block runs, the first after a
    few seconds. On a terminal it prints nothing, since live displays do.
    """

    def __init__(
        self,
        console: Console,
        *,
        first: float | None = None,
        silence: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Print to a console after `first` seconds, then at least `silence` seconds apart; `clock` tells them."""
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
        """Record a stage's progress (see `progress.stages.Display`)."""
        with self._lock:
            for running in self._stages:
                if running.name == stage:
                    is_new = done > running.done or not running.total
                    running.done, running.total, running.unit, running.detail = done, total, unit, detail
                    running.has_news = running.has_news or is_new

    def shown(self) -> None:
        """Record that something else was just printed."""
        with self._lock:
            self._due = self._clock() + self._silence

    def beat(self) -> float:
        """Print a line if one is due and there is news; return the seconds until the next can be."""
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


SILENCED = "GRALORA_FX_PROGRESS"  # environment variable; 0 shows nothing

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def is_silenced() -> bool:
    """Return whether the environment asks for no progress."""
    return os.environ.get(SILENCED, "").strip().lower() in ("0", "off", "no", "false")


class StageProgress:
    """Shows stages: live on a terminal, as lines elsewhere; nothing if they are shown already or silenced."""

    def __init__(self, console: Console | None = None, *, silence: float | None = None) -> None:
        """Choose where and how often to show stages."""
        self._console, self._silence = console, silence

    def __enter__(self) -> None:
        self._display: AbstractContextManager[object] = nullcontext()
        if not is_displayed() and not is_silenced():
            # the current stderr, so that the display goes on while the libraries' output is suppressed; in a notebook
            # it is a stream like any other
            console = self._console or Console(file=sys.stderr, highlight=False, soft_wrap=True, force_jupyter=False)
            if console.is_terminal:
                from gralora_fx.base.progress.live_stages import LiveStages

                self._display = LiveStages(console)
            else:
                self._display = Heartbeat(console, first=self._silence, silence=self._silence)
        self._display.__enter__()

    def __exit__(self, kind: object = None, *_: object) -> None:
        """Stop; on a terminal, show the total of several stages unless an error ended the work."""
        self._display.__exit__(kind, None, None)  # type: ignore[arg-type]


class CommandProgress(StageProgress):
    """Shows the stages of a command and the package's other log records."""

    def __enter__(self) -> None:
        """Show the stages of this thread, and the package's log."""
        super().__enter__()
        self._records = _Records()
        logger = logging.getLogger("gralora_fx")
        logger.addHandler(self._records)
        logger.setLevel(logging.INFO)

    def __exit__(self, kind: object = None, *rest: object) -> None:
        """Stop, as `StageProgress` does."""
        logging.getLogger("gralora_fx").removeHandler(self._records)
        super().__exit__(kind, *rest)


class _Records(logging.Handler):
    """Prints the package's log records to stderr, except those of stages, which are shown otherwise."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.addFilter(lambda record: record.name != stages.__name__)

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def with_progress(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Let a public function show its stages, unless its caller shows them."""

    @functools.wraps(function)
    def shown(*args: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        with StageProgress():
            return function(*args, **options)

    return shown
