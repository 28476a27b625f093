"""The most memory that a piece of a test takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def resident() -> int:
    """Return the bytes of this process's memory."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


@contextmanager
def peak() -> Iterator[list[int]]:
    """Yield a list that gets the most bytes that the process takes within the block beyond those that it had."""
    before, most, ended = resident(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], resident() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield most
    finally:
        time.sleep(0.01)
        ended.set()
        watching.join()
