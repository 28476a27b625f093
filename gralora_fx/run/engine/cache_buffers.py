"""The caches of rows in buffers that take memory as rows fill them, and the session that a step runs over them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from gralora_fx.base.compat.onnx_messages import ModelProto
from gralora_fx.base.features import parts
from gralora_fx.base.paged_memory import PAGE, PagedBytes, whole_pages
from gralora_fx.format.cache_slots import past_slots
from gralora_fx.run.sessions.ort_values import STORED_DTYPES, array_of, as_value
from gralora_fx.run.sessions.session import CPU, QUIET_RUN
from gralora_fx.run.sessions.session_views import PAST, PRESENT

# inputs of operators that read a cache and write into the same buffer
_READS_CACHE = {("GroupQueryAttention", 3), ("GroupQueryAttention", 4)}
_BOUND = 4  # stacks of adapters that stay bound
_LEAST, _SHARE = 4, 16  # pages that a part takes at a time: at least 4, or a 16th of those it has
_AHEAD = 64  # pages that it takes at a time of a text that is known


@dataclass(frozen=True)
class _Parts:
    """Equal parts of a row's cache, each starting at a page: keys of a head in a layer, values, or a state."""

    count: int  # how many there are
    width: int  # bytes of a position; of a state, which has none, all of its bytes
    grows: bool  # whether it has positions


class RowLayout:
    """The parts of a row's cache, and how much memory they take.

    Attributes:
        length: Positions for which a row has room, filling whole pages in every part; None for no limit.
    """

    def __init__(self, inputs: Iterable[Any], part: str = "decoder", length: int | None = None) -> None:
        """Read the parts from the inputs of a session."""
        counts: Counter[tuple[int, bool]] = Counter()
        for slot, value in past_slots(inputs).items():
            if slot.part not in ("", part):
                continue
            shape, grows = slot.kind.shape(value.shape, 1, 1), slot.kind.grows
            count = 1 if grows is None else math.prod(shape[1:grows])
            size = math.prod(shape) * STORED_DTYPES[value.type].itemsize
            counts[size // count, grows is not None] += count
        self._parts = [_Parts(count, *kind) for kind, count in counts.items()]
        # so many positions, and multiples of it, fill whole pages in every part
        self._step = max((PAGE // math.gcd(PAGE, each.width) for each in self._parts if each.grows), default=1)
        self.length = None if length is None else -(-length // self._step) * self._step

    def extent(self, positions: int) -> int:
        """Return how many positions a row takes memory for: up to a sixteenth more than it needs, or a few pages.

        Pages that are taken at once are contiguous in memory, which the processor reads faster.
        """
        pages = -(-positions // self._step)
        run = max(1 << (pages // _SHARE).bit_length() >> 1, _LEAST)
        return self._within(-(-pages // run) * run)

    def ahead(self, positions: int, known: int) -> int:
        """Return how many positions a row takes memory for while it reads a text."""
        return self._within(min(-(-known // self._step), -(-positions // self._step) + _AHEAD))

    def _within(self, pages: int) -> int:
        return pages * self._step if self.length is None else min(pages * self._step, self.length)

    def row_size(self, positions: int) -> int:
        """Return the bytes of a row."""
        count = self.extent(positions)
        return sum(each.count * whole_pages(each.width * (count if each.grows else 1)) for each in self._parts)


class CacheBuffers:
    """The caches of rows, each tensor of all rows in one buffer.

    In a buffer every head of every row has its own part of whole pages. So a row takes only the memory that it writes,
    rounded up to pages for each head, and returns all of it when it ends.

    Attributes:
        rows: The number of rows.
        arrays: The buffers by the names of the inputs: keys and values `[rows, heads, length, size]`, and states;
            bfloat16 as its bits.
        values: The same, as a session takes them.
        layout: The parts of a row.
    """

    def __init__(self, session: Any, rows: int, length: int) -> None:
        """Make the buffers, on the CPU."""
        inputs = session.get_inputs()
        self.layout = RowLayout(inputs, length=length)
        assert self.layout.length is not None
        self.rows = rows
        self._length, self._taken, self._known = self.layout.length, [0] * rows, [0] * rows
        self._memory: list[tuple[PagedBytes, int]] = []  # and how many parts with positions a row has in it
        arrays, values = dict[str, NDArray[Any]](), dict[str, Any]()
        for slot, value in past_slots(inputs).items():
            shape, dtype = slot.kind.shape(value.shape, rows, self._length), STORED_DTYPES[value.type]
            count = math.prod(shape)
            memory = PagedBytes(count * dtype.itemsize)
            arrays[value.name] = memory.array.view(dtype).reshape(shape)
            values[value.name] = as_value(arrays[value.name], value.type)
            grows = slot.kind.grows
            self._memory.append((memory, 0 if grows is None else math.prod(shape[1:grows])))
        self.arrays: Mapping[str, NDArray[Any]] = arrays
        self.values: Mapping[str, Any] = values

    def expect(self, row: int, positions: int) -> None:
        """Record how many positions a row will need soon, such as those of its prompt."""
        self._known[row] = positions

    def take(self, row: int, positions: int) -> None:
        """Take the memory that a row writes next."""
        before = self._taken[row]
        if positions <= before:
            return
        is_known = positions <= self._known[row]
        taken = self.layout.ahead(positions, self._known[row]) if is_known else self.layout.extent(positions)
        self._taken[row] = taken
        for memory, count in self._memory:
            for part in range(row * count, (row + 1) * count):
                size = memory.array.nbytes // (self.rows * count)
                width = size // self._length
                memory.take(part * size + before * width, part * size + taken * width)

    def give_back(self, row: int) -> None:
        """Return a row's memory to the system, except pages that its states share with those of other rows."""
        self._taken[row] = self._known[row] = 0
        for memory, _ in self._memory:
            size = memory.array.nbytes // self.rows
            memory.give_back(row * size, (row + 1) * size)


class BufferedSteps:
    """A session over a decoder, with the caches of its rows and the other values that stay bound from step to step.

    A step reads the buffers and overwrites them.
    """

    def __init__(self, session: Any, buffers: CacheBuffers) -> None:
        """Start with buffers, without bindings."""
        self._session, self._rows, self._buffers = session, buffers.rows, buffers
        self._kinds = {value.name: value.type for value in session.get_inputs()}
        self._copies = session.get_providers() != [CPU]  # a binding copies an input to the device when it is bound
        self._windows: list[tuple[Mapping[str, Any], dict[range, _Window]]] = []  # by adapters, most recent first

    def __call__(
        self, arrays: Mapping[str, NDArray[Any]], adapters: Mapping[str, Any], rows: range | None = None
    ) -> NDArray[Any]:
        """Run a step of some rows; return the logits."""
        rows = range(self._rows) if rows is None else rows
        window = self._window(rows, adapters)
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
        _bind(window.binding, {**values, **window.caches} if self._copies else values)
        self._session.run_with_iobinding(window.binding, QUIET_RUN)
        outputs = window.binding.get_outputs_as_ortvaluevector()  # `get_outputs` would wrap every cache
        logits = array_of(outputs[len(outputs) - 1])  # the last that was bound
        window.binding.bind_output("logits")  # it would keep these
        return logits

    def forget(self) -> None:
        """Unbind all adapters, so that their memory can be freed."""
        self._windows = []

    def _window(self, rows: range, adapters: Mapping[str, Any]) -> _Window:
        """Return the binding of some rows with adapters, created once."""
        windows = next((windows for bound, windows in self._windows if bound is adapters), {})
        others = [pair for pair in self._windows if pair[0] is not adapters]
        self._windows = [(adapters, windows), *others[: _BOUND - 1]]
        if rows not in windows:
            windows[rows] = self._bound(rows, adapters)
        return windows[rows]

    def _bound(self, rows: range, adapters: Mapping[str, Any]) -> _Window:
        caches = dict(self._buffers.values)
        if len(rows) < self._rows:
            for name, array in self._buffers.arrays.items():
                caches[name] = as_value(array[rows.start : rows.stop], self._kinds[name])
        binding = self._session.io_binding()
        for name, value in caches.items():
            binding.bind_ortvalue_output(name.replace(PAST, PRESENT, 1), value)
        _bind(binding, caches)
        _bind(binding, adapters)
        binding.bind_output("logits")
        return _Window(binding, caches)


@dataclass(frozen=True)
class _Window:
    """Consecutive rows."""

    binding: Any  # the I/O binding of their steps
    caches: Mapping[str, Any]  # their part of the buffers, by the names of the inputs


def _bind(binding: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)


def takes_buffers(path: Path) -> bool:
    """Return whether a decoder's cache may be a longer buffer than its contents: only fused attention reads it."""
    graph = ModelProto.FromString(path.read_bytes()).graph
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return False  # a branch may read any value
    readers = {(node.op_type, index) for node in graph.node for index, v in enumerate(node.input) if v.startswith(PAST)}
    operators = {f"{node.domain}::{node.op_type}" for node in graph.node}
    return readers <= _READS_CACHE.union(*parts("cache readers", operators))
