"""Stages of long work: timed and counted for a display, the libraries underneath silenced, the collector at rest."""

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
_LEAST = 1.0  # seconds of a stage that say how long it will take
_OBJECTS = 200_000  # allocations before a garbage collection; the default is 700


class _Quiet:
    """The blocks that are quiet now, of all threads, and what they suppress."""

    def __init__(self) -> None:
        self.lock, self.blocks, self.stack = threading.Lock(), 0, ExitStack()


_quiet = _Quiet()


class Display(Protocol):
    """Shows a user what long work is doing; stages may lie within each other."""

    def begin(self, stage: str) -> None:
        """Enter a stage."""

    def end(self, stage: str) -> None:
        """Leave a stage, and those within it that an error ended."""

    def count(self, stage: str, done: int, total: int, unit: str = "", detail: str = "") -> None:
        """Note how far a stage is.

        Args:
            stage: A stage that was entered.
            done: How many things are done.
            total: How many there are.
            unit: What they are, as a plural such as `matrices`; empty where the stage says it.
            detail: What else is news, such as `loss 0.41`.
        """


class Count(Protocol):
    """Notes how far a counted stage is."""

    def __call__(self, done: int, detail: str = "") -> None:
        """Note it."""


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


_display: ContextVar[Display | None] = ContextVar("display", default=None)


def is_displayed() -> bool:
    """Return whether a display shows the stages of this thread."""
    return _display.get() is not None


@contextmanager
def displayed_by(display: Display) -> Iterator[None]:
    """Let a display show the stages of this thread within the block."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


@contextmanager
def timed(name: str, seconds: MutableMapping[str, float] | None = None, shown: str = "") -> Iterator[None]:
    """Show a stage, log its begin and end at level INFO, and record its time if it ends without an error.

    Args:
        name: Name of the stage, such as `trace`.
        seconds: Receives the stage's time under its name.
        shown: What a display calls it; empty for its name.
    """
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
    """Show how far the block is (`choosing bits: 120/210 matrices`): it calls what it gets with how many are done."""
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
    """Yield items, and show how many are done (see `counting`)."""
    with counting(stage, len(items), unit) as count:
        for done, item in enumerate(items):
            count(done)
            yield item


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the prints, logs and warnings of the libraries underneath within the block.

    They are the process's, so blocks of several threads are one: the first begins it, and the last ends it.
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
    """Let the garbage collector run less often within the block.

    A trace creates a million objects that stay alive; scanning them repeatedly takes a sixth of its time.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(_OBJECTS, before[0]) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
