"""Stages of long work: timed and counted for a display, with other libraries silenced and fewer collections."""

from __future__ import annotations

import gc
import io
import logging
import threading
import time
import warnings
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeVar

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_LEAST = 1.0  # minimum seconds of a stage before its remaining time is estimated
_OBJECTS = 200_000  # allocations before a garbage collection; the default is 700


class _Quiet:
    """Count of quiet blocks active in all threads, and their context managers."""

    def __init__(self) -> None:
        self.lock, self.blocks, self.stack = threading.Lock(), 0, ExitStack()


_quiet = _Quiet()


class Display(Protocol):
    """Displays the stages of long work; stages may be nested."""

    def begin(self, stage: str) -> None:
        """Enter a stage."""

    def end(self, stage: str) -> None:
        """Leave a stage, and those within it that an error ended."""

    def count(self, stage: str, done: int, total: int, unit: str = "", detail: str = "") -> None:
        """Record a stage's progress.

        Args:
            stage: A stage that was entered.
            done: Number of things done.
            total: Number of things.
            unit: Plural of the things, such as `matrices`; empty if the stage's name says it.
            detail: Further news, such as `loss 0.41`.
        """


class Count(Protocol):
    """Records a counted stage's progress."""

    def __call__(self, done: int, detail: str = "") -> None:
        """Record it."""


def time_left(seconds: float) -> str:
    """Return the remaining time in words, such as `about 20 s left`."""
    if seconds >= 90:
        return f"about {round(seconds / 60)} min left"
    step = 1 if seconds < 10 else 5
    return f"about {max(step, round(seconds / step) * step)} s left"


@dataclass
class RunningStage:
    """A running stage."""

    name: str
    began: float  # its start, by the clock
    done: int = 0  # number of things done
    total: int = 0  # number of things; 0 if they are not counted
    unit: str = ""  # plural of the things
    detail: str = ""  # further news
    has_news: bool = True  # whether something was not shown yet

    def counts(self, now: float) -> str:
        """Return its progress and remaining time."""
        parts = [f"{self.done}/{self.total} {self.unit}".rstrip()]
        parts += [self.detail] if self.detail else []
        elapsed = now - self.began
        if self.done and elapsed >= _LEAST:
            parts.append(time_left(elapsed / self.done * (self.total - self.done)))
        return ", ".join(parts)

    def line(self, now: float) -> str:
        """Return its line for a log."""
        return f"{self.name}: {self.counts(now)}" if self.total else f"{self.name} ..."


_display: ContextVar[Display | None] = ContextVar("display", default=None)


def is_displayed() -> bool:
    """Return whether a display shows the stages of this thread."""
    return _display.get() is not None


@contextmanager
def displayed_by(display: Display) -> Iterator[None]:
    """Let a display show this thread's stages while the block runs."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


@contextmanager
def timed(name: str, seconds: MutableMapping[str, float] | None = None, shown: str = "") -> Iterator[None]:
    """Show a stage (as `shown`, or its name), log its start and end at INFO, and record its seconds if it succeeds."""
    display = _display.get()
    _log.info("%s ...", name)
    if display is not None:
        display.begin(shown or name)
    begin = time.perf_counter()
    try:
        yield
    finally:
        if display is not None:
            display.end(shown or name)
    elapsed = time.perf_counter() - begin
    if seconds is not None:
        seconds[name] = elapsed
    _log.info("%s: %.1f s", name, elapsed)


@contextmanager
def counting(stage: str, total: int, unit: str) -> Iterator[Count]:
    """Yield a function that shows the block's progress, such as `choosing bits: 120/210 matrices`."""
    display = _display.get()
    if display is None:
        yield lambda done, detail="": None
        return
    display.begin(stage)
    try:
        display.count(stage, 0, total, unit)
        yield lambda done, detail="": display.count(stage, done, total, unit, detail)
    finally:
        display.end(stage)


def counted(items: Collection[_Item], stage: str, unit: str) -> Iterator[_Item]:
    """Yield items, showing how many are done (see `counting`)."""
    with counting(stage, len(items), unit) as count:
        for done, item in enumerate(items):
            count(done)
            yield item


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress prints, logs and warnings of other libraries while the block runs.

    These are process-wide, so nested and concurrent blocks count as one: the first starts it, the last ends it.
    """
    with _quiet.lock:
        _quiet.blocks += 1
        if _quiet.blocks == 1:
            _quiet.stack.enter_context(_suppression())
    try:
        yield
    finally:
        with _quiet.lock:
            _quiet.blocks -= 1
            if not _quiet.blocks:
                _quiet.stack.close()


@contextmanager
def _suppression() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # some of their loggers are named after files, outside any hierarchy
    try:
        sink = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def gc_pause() -> Iterator[None]:
    """Run the garbage collector less often while the block runs: a trace creates a million objects that stay alive."""
    before = gc.get_threshold()
    gc.set_threshold(max(_OBJECTS, before[0]) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
