"""The adapters that onnxruntime-genai holds: its own copies, by the digest of their file."""

from __future__ import annotations

import threading
from typing import Any

from gralora_fx.errors import ServingError
from gralora_fx.runtime.adapter_file import check_file
from gralora_fx.serving.adapters import LoadedAdapter


class GenaiAdapters:
    """The adapters of an onnxruntime-genai model, each read at its first use and freed after its last.

    onnxruntime-genai maps the file into memory, and does not free an adapter that a generator has.
    """

    def __init__(self, adapters: Any) -> None:
        """Take `onnxruntime_genai.Adapters`, empty."""
        self._adapters = adapters
        self._held: set[str] = set()
        self._unwanted: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many are held."""
        return len(self._held)

    def activate(self, generator: Any, adapter: LoadedAdapter) -> None:
        """Let a generator run with an adapter.

        Raises:
            ServingError: The file was changed since it was loaded.
        """
        digest = adapter.record.file_sha256
        with self._lock:
            self._unwanted.discard(digest)
            if digest not in self._held:
                check_file(adapter.path, adapter.record, ServingError)
                self._adapters.load(str(adapter.path), digest)
                self._held.add(digest)
            generator.set_active_adapter(self._adapters, digest)

    def forget(self, digest: str) -> None:
        """Free an adapter, at once or when its last generator is gone.

        Args:
            digest: SHA-256 of its file.
        """
        with self._lock:
            self._unwanted |= {digest} & self._held
        self.sweep()

    def sweep(self) -> None:
        """Free what is to be freed and no generator has any more; called when one is gone."""
        with self._lock:
            for digest in tuple(self._unwanted):
                try:
                    self._adapters.unload(digest)
                except Exception as failure:  # onnxruntime-genai raises types of its own
                    if "in use" not in str(failure):
                        raise
                    continue
                self._held.remove(digest)
                self._unwanted.remove(digest)
