"""Stages of long work: timed and counted for a display, with other libraries silenced and fewer collections."""

from __future__ import annotations

import gc
import logging
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from unittest.mock import patch

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_LEAST = 1.0  # minimum seconds of a stage before its remaining time is estimated
_OBJECTS = 200_000  # allocations before a garbage collection; the default is 700


class _Shared:
    """A change of the process that blocks of several threads share: the first makes it, the last undoes it."""

    def __init__(self, change: Callable[[], AbstractContextManager[None]]) -> None:
        self.change, self.lock, self.blocks, self.stack = change, threading.Lock(), 0, ExitStack()

    @contextmanager
    def block(self) -> Iterator[None]:
        with self.lock:
            self.blocks += 1
            if self.blocks == 1:
                self.stack.enter_context(self.change())
        try:
            yield
        finally:
            with self.lock:
                self.blocks -= 1
                if not self.blocks:
                    self.stack.close()


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


_is_quiet: ContextVar[bool] = ContextVar("is quiet", default=False)


class _InQuietBlocks:
    """The message of a filter of warnings, which matches every warning of a quiet block's thread."""

    def match(self, text: str) -> bool:
        return _is_quiet.get()


@contextmanager
def _suppression() -> Iterator[None]:
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    ignored: Any = ("ignore", _InQuietBlocks(), Warning, None, 0)
    filters: Any = warnings.filters
    handle, draw = logging.Logger.handle, tqdm.__init__

    def handled(logger: logging.Logger, record: logging.LogRecord) -> None:
        if not _is_quiet.get():  # some loggers are named after files, outside any hierarchy
            handle(logger, record)

    def drawn(bar: Any, *args: Any, **options: Any) -> None:
        draw(bar, *args, **{**options, "disable": True} if _is_quiet.get() else options)

    filters.insert(0, ignored)
    try:
        with patch.object(logging.Logger, "handle", handled), patch.object(tqdm, "__init__", drawn):
            yield
    finally:
        current: Any = warnings.filters  # another list, if a thread left a block of its own meanwhile
        if ignored in current:
            current.remove(ignored)


@contextmanager
def _rare_collections() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(max(_OBJECTS, before[0]) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


_suppressed, _collected_rarely = _Shared(_suppression), _Shared(_rare_collections)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress logs, warnings and progress bars in this thread while the block runs; other threads' are kept."""
    with _suppressed.block():
        token = _is_quiet.set(True)
        try:
            yield
        finally:
            _is_quiet.reset(token)


def gc_pause() -> AbstractContextManager[None]:
    """Run the garbage collector less often while the block runs: a trace creates a million objects that stay alive."""
    return _collected_rarely.block()
