"""Stages of long work: timed in the log, the libraries underneath silenced, the garbage collector at rest."""

from __future__ import annotations

import gc
import io
import logging
import threading
import time
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

_log = logging.getLogger(__name__)
_OBJECTS = 200_000  # allocations before a garbage collection; the default is 700


class _Quiet:
    """The blocks that are quiet now, of all threads, and what they suppress."""

    def __init__(self) -> None:
        self.lock, self.blocks, self.stack = threading.Lock(), 0, ExitStack()


_quiet = _Quiet()


@contextmanager
def timed(name: str, seconds: MutableMapping[str, float] | None = None) -> Iterator[None]:
    """Log a stage's begin and end at level INFO, and record its time if it ends without an error.

    The records carry `stage` (its name) and `seconds` (None at its begin), for a handler that shows progress.

    Args:
        name: Name of the stage, such as `trace`.
        seconds: Receives the stage's time under its name.
    """
    _log.info("%s ...", name, extra={"stage": name, "seconds": None})
    begin = time.perf_counter()
    yield
    elapsed = time.perf_counter() - begin
    if seconds is not None:
        seconds[name] = elapsed
    _log.info("%s: %.1f s", name, elapsed, extra={"stage": name, "seconds": elapsed})


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
