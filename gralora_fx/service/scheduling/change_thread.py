"""The thread in which adapters change, one change after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from gralora_fx.service.scheduling.adapter_versions import TooManyChangesError

_MOST = 16  # that wait
_Result = TypeVar("_Result")


class ChangeThread:
    """Runs changes one after the other, in a thread of its own."""

    def __init__(self) -> None:
        """Begin without changes."""
        self._lock, self._waiting = threading.Lock(), 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gralora-fx adapters")

    def submit(self, work: Callable[[], _Result]) -> Future[_Result]:
        """Run some work after the changes that wait already."""
        with self._lock:
            if self._waiting >= _MOST:
                raise TooManyChangesError(f"{self._waiting} changes of adapters wait; ask again later")
            self._waiting += 1

        def counted() -> _Result:
            with self._lock:
                self._waiting -= 1
            return work()

        return self._pool.submit(counted)

    def run_later(self, work: Callable[[], None]) -> None:
        """Run some work of the service itself after the changes that wait; nothing, once the thread has ended."""
        with suppress(RuntimeError):
            self._pool.submit(work)

    def close(self) -> None:
        """End once the changes that wait are done."""
        self._pool.shutdown()
