"""A queue's own thread: it works on what waits until it is told to stop, and then ends once nothing is left."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from gralora_fx.serving.scheduling.failures import StoppedError


class Worker(ABC):
    """A thread that works on what other threads queue under `_condition`."""

    def __init__(self, name: str) -> None:
        """Make the thread; `start` starts it.

        Args:
            name: The thread's name.
        """
        self._condition = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Take nothing more, finish what is there, and end."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
        self._thread.join()

    @property
    @abstractmethod
    def waiting(self) -> int:
        """How many requests, or rows of requests, wait."""

    def _check_takes(self) -> None:
        """Check that the queue still takes work; called with the condition held.

        Raises:
            StoppedError: It is stopping.
        """
        if self._is_stopping:
            raise StoppedError("the service is stopping; ask another one")

    @abstractmethod
    def _work(self) -> None:
        """Work until the queue is stopping and nothing is left."""
