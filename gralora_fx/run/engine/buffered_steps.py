"""A session over a decoder whose caches are buffers, and what else stays bound from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.run.engine.cache_buffers import CacheBuffers
from gralora_fx.run.sessions.ort_values import as_tensor, as_value
from gralora_fx.run.sessions.session import CPU, QUIET_RUN
from gralora_fx.run.sessions.session_views import PAST, PRESENT

# inputs of operators that read a cache and write into the same buffer
_READS_CACHE = {
    ("GroupQueryAttention", 3),
    ("GroupQueryAttention", 4),
    ("CausalConvWithState", 3),
    ("LinearAttention", 3),
}
_BOUND = 4  # stacks of adapters that stay bound


class BufferedSteps:
    """A session over a decoder, with the caches of its rows and what else stays bound from step to step.

    A step reads the buffers and writes over them.
    """

    def __init__(self, session: Any, buffers: CacheBuffers) -> None:
        """Take the buffers."""
        self._session, self._rows, self._caches = session, buffers.rows, buffers.values
        self._kinds = {value.name: value.type for value in session.get_inputs()}
        self._copies = session.get_providers() != [CPU]  # a binding copies an input to the device when it is bound
        self._windows: list[tuple[Mapping[str, Any], dict[range, _Window]]] = []  # by adapters, those of late first

    def __call__(
        self, arrays: Mapping[str, NDArray[Any]], adapters: Mapping[str, Any], rows: range | None = None
    ) -> Tensor:
        """Take a step of some rows."""
        rows = range(self._rows) if rows is None else rows
        window = self._window(rows, adapters)
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
        _bind(window.binding, {**values, **window.caches} if self._copies else values)
        self._session.run_with_iobinding(window.binding, QUIET_RUN)
        outputs = window.binding.get_outputs_as_ortvaluevector()  # `get_outputs` would wrap every cache
        logits = as_tensor(outputs[len(outputs) - 1])  # the last that was bound
        window.binding.bind_output("logits")  # it would keep these
        return logits

    def forget(self) -> None:
        """Unbind all adapters, whose memory is free then."""
        self._windows = []

    def _window(self, rows: range, adapters: Mapping[str, Any]) -> _Window:
        """Some rows, with adapters."""
        windows = next((windows for bound, windows in self._windows if bound is adapters), {})
        others = [pair for pair in self._windows if pair[0] is not adapters]
        self._windows = [(adapters, windows), *others[: _BOUND - 1]]
        if rows not in windows:
            windows[rows] = self._bound(rows, adapters)
        return windows[rows]

    def _bound(self, rows: range, adapters: Mapping[str, Any]) -> _Window:
        caches = dict(self._caches)
        if len(rows) < self._rows:
            for name, value in self._caches.items():
                caches[name] = as_value(as_tensor(value)[rows.start : rows.stop], self._kinds[name])
        binding = self._session.io_binding()
        for name, value in caches.items():
            binding.bind_ortvalue_output(name.replace(PAST, PRESENT, 1), value)
        _bind(binding, caches)
        _bind(binding, adapters)
        binding.bind_output("logits")
        return _Window(binding, caches)


@dataclass(frozen=True)
class _Window:
    """Rows that follow each other.

    Attributes:
        binding: What is bound for their steps.
        caches: Their part of the buffers, by the names of the inputs.
    """

    binding: Any
    caches: Mapping[str, Any]


def _bind(binding: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)


def takes_buffers(path: Path) -> bool:
    """Whether a decoder's cache may be a buffer that is longer than what it holds: fused attention alone reads it."""
    graph = onnx.load(str(path), load_external_data=False).graph
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return False  # a branch may read any value
    readers = {(node.op_type, index) for node in graph.node for index, v in enumerate(node.input) if v.startswith(PAST)}
    return readers <= _READS_CACHE
