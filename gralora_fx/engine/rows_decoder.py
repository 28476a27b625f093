"""A decoder whose graph has rows of their own lengths: all of them in one run, each with its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.engine.adapters import Adapters, LoadedAdapter, Stack
from gralora_fx.engine.buffered_steps import BufferedSteps
from gralora_fx.engine.decoder import Decoder, Source, gives_all
from gralora_fx.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.errors import ServingError
from gralora_fx.runtime.adapter_arrays import BASE
from gralora_fx.runtime.adapter_inputs import ADAPTER_IDS
from gralora_fx.runtime.export_directory import PAST_SEQLENS, QUERY_SEQLENS
from gralora_fx.runtime.ort_values import as_tensor


class RowsDecoder(Decoder):
    """The rows' graph with caches in shared buffers; a step runs the rows from the first to the last that read."""

    def __init__(
        self,
        session: Any,
        adapters: Adapters,
        limits: DecoderLimits,
        size: DecoderSize,
    ) -> None:
        """Make the caches of the rows.

        Args:
            session: A session over a rows' graph.
            adapters: The adapters that rows choose among.
            limits: As of `Decoder`.
            size: As of `Decoder`.

        Raises:
            ServingError: As of `Decoder`.
        """
        super().__init__(limits, size, gives_all=gives_all(session))
        self._adapters = adapters
        self._takes_adapters = any(value.name == ADAPTER_IDS for value in session.get_inputs())
        self._row_adapters: dict[int, LoadedAdapter | None] = {}
        self._stack: Stack | None = None
        widest = min(self.chunk, self.capacity)  # the operator writes a chunk as long as the longest, wherever a row is
        try:
            self._steps = BufferedSteps(session, rows=self.rows, length=self.capacity + widest)
        except (MemoryError, OverflowError, ValueError) as failure:
            raise ServingError(
                f"there is no memory for the caches of {self.rows} rows of {self.capacity} tokens; give fewer rows, or "
                "a smaller capacity"
            ) from failure

    def cached(self, row: int) -> dict[str, Tensor]:
        """The keys and values of a row, `[heads, positions, size]` by the names of the inputs, in the row's own memory.

        Args:
            row: Its number, as `open` gave it; positions that it has not read yet hold anything.
        """
        return {name: as_tensor(value)[row] for name, value in self._steps.caches.items()}

    def _begin(self, row: int, adapter: str | None, source: Source | None) -> None:
        if source is not None:
            raise ServingError("a decoder has no encoder to read a source; leave it out")
        self._row_adapters[row] = None if adapter is None else self._adapters[adapter]

    def _end(self, row: int) -> None:
        del self._row_adapters[row]
        if not self._row_adapters:  # frees the memory of adapters that are gone
            self._stack = None
            self._steps.forget_adapters()

    def _run(self, read: Mapping[int, NDArray[np.int64]], past: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        rows = range(min(read), max(read) + 1)  # the others take no time at all
        ids = np.zeros((len(rows), max(map(len, read.values()))), dtype=np.int64)
        query = np.zeros(len(rows), dtype=np.int32)
        for row, array in read.items():
            ids[row - rows.start, : len(array)], query[row - rows.start] = array, len(array)
        before = np.array([self._lengths.get(row, 0) for row in rows], dtype=np.int32)
        feed: dict[str, NDArray[Any]] = {"input_ids": ids, QUERY_SEQLENS: query, PAST_SEQLENS: before}
        numbers, values = self._of_adapters()
        if numbers is not None:
            feed[ADAPTER_IDS] = numbers[rows.start : rows.stop]
        logits: NDArray[Any] = self._steps(feed, values, rows).float().numpy()
        return {
            row: logits[row - rows.start, slice(len(array)) if self.gives_all else 0] for row, array in read.items()
        }

    def _of_adapters(self) -> tuple[NDArray[np.int64] | None, Mapping[str, Any]]:
        """The id of each row's adapter, and the stacked tensors; neither for a graph without adapters."""
        if not self._takes_adapters:
            return None, {}
        used = [adapter for adapter in self._row_adapters.values() if adapter is not None]
        if self._stack is None or not all(adapter in self._stack.ids for adapter in used):
            self._stack = self._adapters.stack_of(used)
        numbers = np.full(self.rows, BASE, dtype=np.int64)
        for row, adapter in self._row_adapters.items():
            numbers[row] = self._stack.ids[adapter]
        return numbers, self._stack.values
