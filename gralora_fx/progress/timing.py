"""Timing of the stages of long work, logged as each begins and ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

_log = logging.getLogger(__name__)


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
