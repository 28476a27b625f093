"""Stages of long work: timed and counted for a display, with other libraries silenced and fewer collections."""

from __future__ import annotations

import gc
import logging
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import ContextVar
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast
from unittest.mock import patch

if TYPE_CHECKING:
    from rich.progress import Progress, Task

_Item = TypeVar("_Item")
_OBJECTS = 200_000  # allocations before a garbage collection; the default is 700

displayed: ContextVar[Progress | None] = ContextVar("displayed", default=None)  # shows this thread's stages


def running(progress: Progress) -> list[Task]:
    """Return the running stages, the innermost last."""
    return [task for task in progress.tasks if task.stop_time is None]


@contextmanager
def counting(stage: str, total: int | None = None, unit: str = "") -> Iterator[Callable[..., None]]:
    """Yield a function that shows how many are done, and further news, such as `choosing bits: 120/210 matrices`."""
    progress = displayed.get()
    if progress is None:
        yield lambda done, detail="": None
        return
    if progress.console.is_terminal:
        progress.start()
    is_outermost = not running(progress)
    task = progress.add_task(stage, total=total, unit=unit, detail="", said=-1, is_outermost=is_outermost)
    try:
        yield lambda done, detail="": progress.update(task, completed=done, detail=detail)
    finally:
        for ended in running(progress):
            if ended.id >= task:  # the stage, and those within it that an error ended
                progress.stop_task(ended.id)  # a counted one's time is part of the enclosing one's
                progress.update(ended.id, total=0, visible=ended.total is None)


@contextmanager
def timed(name: str, seconds: MutableMapping[str, float] | None = None, shown: str = "") -> Iterator[None]:
    """Show a stage (as `shown`, or its name), and record its seconds if it succeeds."""
    begin = time.perf_counter()
    with counting(shown or name):
        yield
    if seconds is not None:
        seconds[name] = time.perf_counter() - begin


def counted(items: Collection[_Item], stage: str, unit: str) -> Iterator[_Item]:
    """Yield items, showing how many are done (see `counting`)."""
    with counting(stage, len(items), unit) as count:
        for done, item in enumerate(items):
            count(done)
            yield item


def _shared(change: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Let blocks of several threads share a change of the process: the first makes it, the last undoes it."""
    lock, blocks, stack = threading.Lock(), [0], ExitStack()

    @contextmanager
    def block() -> Iterator[None]:
        with lock:
            if not blocks[0]:
                stack.enter_context(change())
            blocks[0] += 1
        try:
            yield
        finally:
            with lock:
                blocks[0] -= 1
                if not blocks[0]:
                    stack.close()

    return block


@_shared
@contextmanager
def gc_pause() -> Iterator[None]:
    """Run the garbage collector less often while the block runs: a trace creates a million objects that stay alive."""
    before = gc.get_threshold()
    gc.set_threshold(max(_OBJECTS, before[0]) if before[0] else 0, *before[1:])
    yield
    gc.set_threshold(*before)


_is_quiet: ContextVar[bool] = ContextVar("is quiet", default=False)


@_shared
@contextmanager
def _suppression() -> Iterator[None]:
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    handle, draw, filters = logging.Logger.handle, tqdm.__init__, cast("list[Any]", warnings.filters)
    ignored = ("ignore", SimpleNamespace(match=lambda text: _is_quiet.get()), Warning, None, 0)

    def handled(logger: logging.Logger, record: logging.LogRecord) -> None:
        if not _is_quiet.get():  # some loggers are named after files, outside any hierarchy
            handle(logger, record)

    def drawn(bar: Any, *args: Any, **options: Any) -> None:
        draw(bar, *args, **{**options, "disable": True} if _is_quiet.get() else options)

    filters.insert(0, ignored)
    with patch.object(logging.Logger, "handle", handled), patch.object(tqdm, "__init__", drawn):
        yield
    with suppress(ValueError):  # another list is there, if a thread left a block of its own meanwhile
        cast("list[Any]", warnings.filters).remove(ignored)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress logs, warnings and progress bars in this thread while the block runs; other threads' are kept."""
    with _suppression():
        token = _is_quiet.set(True)
        try:
            yield
        finally:
            _is_quiet.reset(token)
