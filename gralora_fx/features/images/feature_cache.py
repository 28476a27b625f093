"""Features of images that were read lately."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

from gralora_fx.features.images.image_rows import Outputs
from gralora_fx.run.engine.adapters import LoadedAdapter

_CACHED = 2**28  # bytes of features that are kept


class FeatureCache:
    """Features of recently read images, by digest of their pixels and (weakly held) adapter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[Any, tuple[Outputs, Any]] = OrderedDict()
        self._bytes = 0

    def get(self, digest: bytes, adapter: LoadedAdapter | None) -> Outputs | None:
        """Return what is known of an image."""
        with self._lock:
            outputs, of = self._found.get((digest, id(adapter)), (None, None))
            if outputs is None or (of is not None and of() is not adapter):
                return None
            self._found.move_to_end((digest, id(adapter)))
            return outputs

    def put(self, digest: bytes, adapter: LoadedAdapter | None, outputs: Outputs) -> None:
        """Keep what was read; the oldest go."""
        key = (digest, id(adapter))
        with self._lock:
            if key in self._found:  # also of an adapter that is gone, whose number another has
                self._bytes -= _size(self._found.pop(key)[0])
            self._found[key] = (outputs, None if adapter is None else weakref.ref(adapter))
            self._bytes += _size(outputs)
            while self._bytes > _CACHED and len(self._found) > 1:
                _, (oldest, _) = self._found.popitem(last=False)
                self._bytes -= _size(oldest)


def _size(outputs: Outputs) -> int:
    return sum(array.nbytes for array in outputs.values())
