"""What an encoder gave for the sources that it read last."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from gralora_fx.engine.decoder import Source

_MOST = 8  # sources


class Encodings:
    """The encoder's outputs for some sources, each with an adapter, the last ones that were asked for.

    A source is often read more than once: for several answers, or to hear its language first.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._known: OrderedDict[tuple[str | None, bytes], tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: Source, name: str | None, adapter: Any, encode: Callable[[], Any]) -> Any:
        """The encoder's output for a source.

        Args:
            source: What it reads, by name.
            name: The adapter's name; None for the base.
            adapter: The adapter itself, since another may get its name; None for the base.
            encode: Runs the encoder.
        """
        key = name, _digest(source)
        with self._lock:
            ref, output = self._known.get(key, (None, None))
        if output is None or (None if ref is None else ref()) is not adapter:
            ref, output = None if adapter is None else weakref.ref(adapter), encode()
        with self._lock:
            self._known[key] = ref, output
            self._known.move_to_end(key)
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
        return output


def _digest(source: Source) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(source):
        array = np.ascontiguousarray(source[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.data)
    return digest.digest()
