"""A decoder's `model.onnx`, whose rows cannot have different lengths: it runs one row after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from gralora_fx.errors import ServingError
from gralora_fx.format.export_directory import TEXT_SEQLENS
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.engine.cache_buffers import BufferedSteps, CacheBuffers, RowLayout
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.run.engine.session_decoders import given_rows, texts_of
from gralora_fx.run.sessions.ort_values import array_of, empty_values
from gralora_fx.run.sessions.session import QUIET_RUN
from gralora_fx.run.sessions.session_views import as_past, gives_all, reads_tokens_apart


@dataclass
class _Row:
    """A row that is open."""

    values: Mapping[str, Any]  # the tensors of its adapter, as the session takes them
    base: Mapping[str, Any]  # tensors of the base, with which it reads before its adapter is active
    steps: BufferedSteps | None  # runs it if its cache is in buffers; None if a step returns the next cache
    cache: Mapping[str, Any]  # its keys and values from the last step
    # tokens to read in one step with those after them (see `GivenRows.joins`)
    held: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


class SequentialDecoder(Decoder):
    """`model.onnx`, run for one row after the other, each with its own cache.

    If only attention reads the cache, it is a buffer that each step extends; else each step returns the next cache.
    """

    def __init__(
        self, session: Any, adapters: Adapters, limits: DecoderLimits, size: DecoderSize, *, takes_buffers: bool
    ) -> None:
        """Start without rows."""
        super().__init__(limits, size, gives_all=gives_all(session), is_apart=reads_tokens_apart(session))
        if not takes_buffers:
            self.alone = self.chunk  # the last bits of its attention may depend on the pieces
        self._session, self._adapters, self._takes_buffers = session, adapters, takes_buffers
        self._given, self._layout, self._texts = given_rows(session), RowLayout(session.get_inputs()), texts_of(session)
        self._inputs = {value.name for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        self._open: dict[int, _Row] = {}

    def _begin(self, row: int, adapter: str | None, source: Source | None) -> None:
        self._given.begin(row, source)
        if (start := self.start(row)) and self._given.joins(row, start):
            raise ServingError(
                f"the adapter of row {row} begins to act at token {start}, between tokens that are read at once; give "
                "an adapter whose invocation begins before or after them"
            )
        values = self._adapters.tensors_for(adapter, self._session)
        base = self._adapters.tensors_for(None, self._session) if start else values
        if self._takes_buffers:
            steps = BufferedSteps(self._session, CacheBuffers(self._session, 1, self.capacity))
            self._open[row] = _Row(values, base, steps, {})
        else:
            self._open[row] = _Row(values, base, None, empty_values(self._session, 1))

    def _row_size(self, tokens: int, count: int) -> int:
        return self._layout.row_size(tokens + count)

    def _source_size(self, source: Source | None) -> int:
        return 0 if source is None else self._given.size(source)

    def _end(self, row: int) -> None:
        self._given.begin(row, None)
        del self._open[row]

    def _run(self, read: Mapping[int, NDArray[np.int64]], last: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        stepped: dict[int, tuple[Mapping[str, Any], NDArray[Any], NDArray[np.int64]]] = {}
        for number, new in read.items():
            row, total = self._open[number], self._lengths[number] + len(new)
            tokens = np.concatenate([row.held, new])
            if not self._given.joins(number, total):
                stepped[number] = (*self._step(number, tokens, total - len(tokens)), tokens[:0])
            elif self.gives_all:
                raise ServingError(
                    f"row {number} reads a part of tokens that are read at once, and the export gives the logits "
                    "after each; give a larger chunk"
                )
            else:  # in the middle of a prompt, where logits are not needed
                stepped[number] = row.cache, np.full(self.limits.vocabulary or 1, np.nan, np.float32), tokens
        for number, (cache, _, held) in stepped.items():
            self._open[number].cache, self._open[number].held = cache, held
        return {number: logits for number, (_, logits, _) in stepped.items()}

    def _step(self, number: int, tokens: NDArray[np.int64], past: int) -> tuple[Mapping[str, Any], NDArray[Any]]:
        """Return a row's new cache after it has read tokens, if it is replaced, and the logits."""
        row, total, ids = self._open[number], past + len(tokens), tokens[None].copy()
        adapter = row.values if self.acts(number, past) else row.base
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
        }
        feed: dict[str, NDArray[Any]] = {name: array for name, array in inputs.items() if name in self._inputs}
        feed |= self._given.arrays({number: tokens}, {number: past}, range(number, number + 1), ids)
        if self._texts is not None:
            feed[TEXT_SEQLENS] = self._texts.totals(range(number, number + 1), {number: tokens}, {number: past})
        cache: Mapping[str, Any] = {}
        if row.steps is not None:
            logits = row.steps(feed, adapter)
        else:
            own = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
            values = {**own, **row.cache, **adapter}
            outputs = self._session.run_with_ort_values(self._outputs, values, QUIET_RUN)
            results = dict(zip(self._outputs, outputs, strict=True))
            cache, logits = as_past(results), array_of(results["logits"])
        array = np.asarray(logits[0], np.float32)
        return cache, array if self.gives_all else array[-1]
