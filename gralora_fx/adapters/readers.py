"""A readers-writer lock: tensors are not written while a thread runs the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Readers:
    """Lets any number of threads run the model, or one thread write its tensors.

    Switching adapters needs neither: it builds another graph and swaps one reference. The lock is reentrant: a thread
    that runs the model may run it again or write within that run, as a hook does.
    """

    def __init__(self) -> None:
        """Start with no readers and no writer."""
        self._changed = threading.Condition()
        self._reading: dict[int, int] = {}  # thread: how often
        self._writer: int | None = None
        self._writing = 0

    def __enter__(self) -> None:
        """Start reading, once no other thread writes."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._writer in (None, me) or me in self._reading)
            self._reading[me] = self._reading.get(me, 0) + 1

    def __exit__(self, *_: object) -> None:
        """Stop reading."""
        me = threading.get_ident()
        with self._changed:
            self._reading[me] -= 1
            if not self._reading[me]:
                del self._reading[me]
                self._changed.notify_all()

    @property
    def is_read(self) -> bool:
        """Whether any thread reads."""
        return bool(self._reading)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Exclude other readers and writers within the block, once those at work have finished."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._writer in (None, me))
            self._writer = me
            self._writing += 1
            self._changed.wait_for(lambda: not self._reading.keys() - {me})
        try:
            yield
        finally:
            with self._changed:
                self._writing -= 1
                if not self._writing:
                    self._writer = None
                    self._changed.notify_all()
