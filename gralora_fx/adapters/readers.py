"""Who is running a model at this moment, so that its tensors are not written while someone reads them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Readers:
    """Any number of threads that run the model, or one that writes its tensors.

    A switch of adapters needs neither: it makes another graph and swaps one reference. A thread that runs the model may
    run it again, or write, within that run (a hook): it does not wait for itself.
    """

    def __init__(self) -> None:
        """Nobody reads and nobody writes."""
        self._changed = threading.Condition()
        self._reading: dict[int, int] = {}  # thread: how often
        self._writer: int | None = None
        self._writing = 0

    def __enter__(self) -> None:
        """Begin to read, when no other thread writes."""
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
        """Keep other threads from reading and writing while the block lasts, once those that do have finished."""
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
