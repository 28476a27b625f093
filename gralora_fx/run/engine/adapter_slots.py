"""The adapters of a decoder's open rows, copied to their own buffers when a row first needs them.

Other loaded adapters cost a step nothing. If some adapters have much larger ranks, all would have to be padded to them:
if a second reading of the weights costs less, there are two stacks, of small and of large adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from numpy.typing import NDArray

from gralora_fx.format.adapter_inputs import BASE, AdapterInputs
from gralora_fx.run.engine.adapters import LoadedAdapter, Stack
from gralora_fx.run.sessions.adapter_arrays import (
    Ranks,
    as_ort_value,
    empty_stack,
    largest_ranks,
    most_tokens_alone,
    ranks_of,
    slot_size,
    write_adapter,
)

_SPARE = 2  # times as wide as needed that buffers may be before narrower ones take their place


class AdapterSlots:
    """Buffers with room for some adapters, as wide as the largest ranks in use.

    Adapters in use come first in the stack, without gaps: a step reads all of it.
    """

    def __init__(self, inputs: AdapterInputs, count: int) -> None:
        """Start without buffers."""
        self._inputs, self._count = inputs, count
        self._room: Ranks = ()
        self._most = 0  # the most adapters that these buffers had at a time
        self._arrays: Mapping[str, NDArray[Any]] = {}
        self._values: dict[int, Mapping[str, Any]] = {}  # by how many adapters they have
        self._alone: tuple[Mapping[str, Any], int] | None = None  # the first adapter without the base: `Stack.only`
        self._ids: WeakKeyDictionary[LoadedAdapter, int] = WeakKeyDictionary()
        self._ranks: WeakKeyDictionary[LoadedAdapter, Ranks] = WeakKeyDictionary()

    def stack_of(self, used: Sequence[LoadedAdapter]) -> Stack:
        """Return a stack of some adapters, valid until the next call."""
        self._make_room(used)
        self._most, last = max(self._most, len(used)), BASE + len(used)
        ids: dict[LoadedAdapter | None, int] = {None: BASE}
        ids |= {adapter: number for adapter in used if (number := self._ids.get(adapter, last + 1)) <= last}
        free = iter(sorted({*range(BASE + 1, last + 1)} - {*ids.values()}))
        for adapter in used:
            if adapter not in ids:
                number = ids[adapter] = next(free)
                for other in [other for other, taken in self._ids.items() if taken == number]:
                    del self._ids[other]
                write_adapter(self._arrays, number, adapter.tensors, self._inputs)
                self._ids[adapter] = number
        if last not in self._values:
            self._values[last] = {name: as_ort_value(array[: last + 1]) for name, array in self._arrays.items()}
        if len(used) != 1:
            return Stack(ids, self._values[last])
        if self._alone is None:
            only = {name: as_ort_value(array[last : last + 1]) for name, array in self._arrays.items()}
            self._alone = only, most_tokens_alone(self._room, self._inputs)
        return Stack(ids, self._values[last], *self._alone)

    def size(self, used: Sequence[LoadedAdapter]) -> int:
        """Return the bytes of a stack of some adapters in buffers of just the size it needs."""
        return (BASE + 1 + len(used)) * slot_size(self._needed(used), self._inputs) if used else 0

    def spare(self, used: Sequence[LoadedAdapter]) -> int:
        """Return how many more bytes the stack takes in the present buffers."""
        if not self._arrays or self.is_misfit(used):
            return 0
        count = BASE + 1 + max(self._most, len(used))
        return count * slot_size(self._room, self._inputs) - self.size(used)

    def is_misfit(self, used: Sequence[LoadedAdapter]) -> bool:
        """Return whether the present buffers are too narrow for some adapters, or much too wide."""
        if not self._arrays or not used:
            return False
        needed = self._needed(used)
        is_wide = all(r <= own and h <= own_h for (r, h), (own, own_h) in zip(needed, self._room, strict=True))
        return not is_wide or sum(map(sum, self._room)) > _SPARE * max(sum(map(sum, needed)), 1)

    def _needed(self, used: Sequence[LoadedAdapter]) -> Ranks:
        for adapter in used:
            if adapter not in self._ranks:
                self._ranks[adapter] = ranks_of(adapter.tensors, self._inputs)
        return largest_ranks([self._ranks[adapter] for adapter in used], self._inputs)

    def _make_room(self, used: Sequence[LoadedAdapter]) -> None:
        """Replace the buffers if they do not fit."""
        if self._arrays and not self.is_misfit(used):
            return
        self._room, self._values, self._alone, self._most = self._needed(used), {}, None, 0
        self._ids.clear()
        self._arrays = {}  # free them before others are allocated
        self._arrays = empty_stack(self._count, self._room, self._inputs)


class RowStacks:
    """The stacks that a decoder's rows choose from: one, or one of small and one of large adapters."""

    def __init__(self, inputs: AdapterInputs, rows: int, weights: int) -> None:
        """Start without adapters."""
        self._inputs, self._count, self._weights = inputs, rows, weights
        self.clear()

    def of(self, used: Sequence[LoadedAdapter | None]) -> list[Stack]:
        """Return the stacks for a step; every adapter is in one of them, and the base in all."""
        return [slots.stack_of(part) for slots, part in self._parts(used)]

    def clear(self) -> None:
        """Free all buffers."""
        self._slots = tuple(AdapterSlots(self._inputs, self._count) for _ in range(2))

    def size(self, used: Sequence[LoadedAdapter | None]) -> int:
        """Return the bytes of the stacks for a step in buffers of just the size they need."""
        return sum(slots.size(part) for slots, part in self._parts(used))

    def is_misfit(self, used: Sequence[LoadedAdapter | None]) -> bool:
        """Return whether they would replace buffers that are too narrow or much too wide."""
        return any(slots.is_misfit(part) for slots, part in self._parts(used))

    def spare(self, used: Sequence[LoadedAdapter | None]) -> int:
        """Return how many more bytes the stacks take in the present buffers."""
        parts = dict(self._parts(used))
        return sum(slots.spare(parts.get(slots, [])) for slots in self._slots)

    def _parts(self, used: Sequence[LoadedAdapter | None]) -> list[tuple[AdapterSlots, list[LoadedAdapter]]]:
        """Return the buffers, each with its adapters."""
        adapters = sorted({each for each in used if each is not None}, key=lambda each: (each.size, each.name))
        small = _small([adapter.size for adapter in adapters], self._weights)
        parts = [part for part in (adapters[:small], adapters[small:]) if part]
        return list(zip(self._slots, parts or [[]], strict=False))


def _small(sizes: Sequence[int], weights: int) -> int:
    """Return how many adapters, the smallest first, to run apart from the larger ones; all of them for one run.

    A run reads the weights once, and each adapter as if it had the size of the run's largest.
    """

    def cost(small: int) -> int:
        parts = [part for part in (sizes[:small], sizes[small:]) if part]
        return sum(weights + len(part) * part[-1] for part in parts)

    return min(range(len(sizes), 0, -1), key=cost, default=0)
