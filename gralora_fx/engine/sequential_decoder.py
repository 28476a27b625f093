"""A decoder whose graph has one length for all rows: a row at a time, on any execution provider."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from gralora_fx.engine.adapters import Adapters
from gralora_fx.engine.buffered_steps import BufferedSteps
from gralora_fx.engine.decoder import Decoder, Source, gives_all
from gralora_fx.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.errors import ServingError
from gralora_fx.runtime.ort_values import as_tensor, empty_values
from gralora_fx.runtime.session import QUIET_RUN
from gralora_fx.runtime.session_views import PAST, as_past

_READS_CACHE = {("GroupQueryAttention", 3), ("GroupQueryAttention", 4)}  # and writes into the same buffer


def takes_buffers(path: Path) -> bool:
    """Whether a decoder's cache may be a buffer that is longer than what it holds: fused attention alone reads it.

    Args:
        path: The ONNX model; its weights are not read.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return False  # a branch may read any value
    readers = {(node.op_type, index) for node in graph.node for index, v in enumerate(node.input) if v.startswith(PAST)}
    return readers <= _READS_CACHE


@dataclass
class _Row:
    """A row that is open.

    Attributes:
        values: The tensors of its adapter, as the session takes them.
        steps: What runs it where its cache is in buffers; None where a step gives the next cache.
        cache: Its keys and values, which the last step gave.
    """

    values: Mapping[str, Any]
    steps: BufferedSteps | None
    cache: Mapping[str, Any]


class SequentialDecoder(Decoder):
    """`model.onnx`, run for one row after the other, each with a cache of its own.

    The cache is a buffer that each step extends where attention alone reads it; else a step gives the next one.
    """

    def __init__(
        self,
        session: Any,
        adapters: Adapters,
        limits: DecoderLimits,
        size: DecoderSize,
        *,
        takes_buffers: bool,
    ) -> None:
        """Begin without rows.

        Args:
            session: A session over the model.
            adapters: The adapters that rows choose among.
            limits: As of `Decoder`.
            size: As of `Decoder`.
            takes_buffers: Whether a cache may be longer than what it holds (see `takes_buffers`).

        Raises:
            ServingError: As of `Decoder`.
        """
        super().__init__(limits, size, gives_all=gives_all(session))
        self._session, self._adapters, self._takes_buffers = session, adapters, takes_buffers
        self._inputs = {value.name for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        self._open: dict[int, _Row] = {}

    def _begin(self, row: int, adapter: str | None, source: Source | None) -> None:
        if source is not None:
            raise ServingError("a decoder has no encoder to read a source; leave it out")
        values = self._adapters.tensors_for(adapter, self._session)
        steps = BufferedSteps(self._session, rows=1, length=self.capacity) if self._takes_buffers else None
        self._open[row] = _Row(values, steps, {} if steps is not None else empty_values(self._session, 1))

    def _end(self, row: int) -> None:
        del self._open[row]

    def _run(self, read: Mapping[int, NDArray[np.int64]], past: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        stepped = {row: self._step(self._open[row], tokens, past[row]) for row, tokens in read.items()}
        for row, (cache, _) in stepped.items():
            self._open[row].cache = cache
        return {row: logits for row, (_, logits) in stepped.items()}

    def _step(self, row: _Row, tokens: NDArray[np.int64], past: int) -> tuple[Mapping[str, Any], NDArray[Any]]:
        """The cache after a row has read tokens, where that is another one, and the logits."""
        total = past + len(tokens)
        inputs = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
        }
        feed = {name: array for name, array in inputs.items() if name in self._inputs}
        cache: Mapping[str, Any] = {}
        if row.steps is not None:
            logits = row.steps(feed, row.values)
        else:
            own = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
            values = {**own, **row.cache, **row.values}
            outputs = self._session.run_with_ort_values(self._outputs, values, QUIET_RUN)
            results = dict(zip(self._outputs, outputs, strict=True))
            cache, logits = as_past(results), as_tensor(results["logits"])
        array: NDArray[Any] = logits[0].float().numpy()
        return cache, array if self.gives_all else array[-1]
