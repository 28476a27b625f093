"""The tensors that a model keeps between its steps: kinds of state, and their names in an export."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gralora_fx.base.features import parts
from gralora_fx.format.input_names import PAST_PREFIX, PRESENT_PREFIX


@dataclass(frozen=True)
class StateKind:
    """A kind of tensor that a layer keeps between steps; its first axis is the batch."""

    name: str  # the kind's part of the names of inputs and outputs
    attribute: str  # the attribute of a layer of transformers' cache: a tensor, or a dict of several by their number
    # the axis of positions, which a step makes longer. None for a state of fixed size, which a step replaces; it is
    # zeros before the first step.
    grows: int | None = None
    axes: tuple[str, ...] = ("batch_size",)  # names of its axes in an export; the last axes may have fixed sizes
    # whether it accumulates over all positions. Exports in half precision keep it in float32, since rounding errors
    # would add up over a text, and padding takes as long as other positions.
    sums_up: bool = False
    # whether its last axis holds a layer's last inputs. A model may keep one more, the oldest, than a step reads again.
    is_window: bool = False
    beside: str = ""  # the attribute of the cache itself, a list with an item for each layer, where some models keep it

    def shape(self, like: Sequence[Any], batch: int, length: int) -> tuple[int, ...]:
        """Return the shape for a batch size and a number of positions."""
        sizes = [batch, *like[1:]]
        if self.grows is not None:
            sizes[self.grows] = length
        return tuple(sizes)


_POSITIONS = ("batch_size", "num_key_value_heads", "past_sequence_length", "head_size")
KINDS = {
    kind.name: kind
    for kind in (
        StateKind("key", "keys", grows=2, axes=_POSITIONS),  # [batch, key heads, positions, size]
        StateKind("value", "values", grows=2, axes=_POSITIONS),
        # [batch, positions, size], from which sparse attention chooses its keys
        StateKind("indexer", "indexer_keys", grows=1, axes=("batch_size", "past_sequence_length", "index_size")),
    )
}


def kinds_shown(signs: Collection[str]) -> dict[str, StateKind]:
    """Return the kinds of state by name, including those of features that the signs indicate."""
    if KINDS.keys() >= set(signs):
        return KINDS
    kinds = dict(KINDS)
    for others in parts("cache kinds", signs):
        kinds |= others
    return kinds


@dataclass(frozen=True)
class CacheSlot:
    """One tensor of a cache."""

    layer: int  # the layer that keeps it
    kind: StateKind
    number: int = 0  # its number among several of the kind in a layer
    part: str = ""  # in an encoder-decoder's cache `"decoder"` or `"encoder"`; else empty

    @property
    def place(self) -> str:
        """Its name without the prefix, such as `3.conv`."""
        parts = [str(self.layer), self.part, self.kind.name, str(self.number) if self.number else ""]
        return ".".join(part for part in parts if part)

    @property
    def past(self) -> str:
        """The name of a step's input for it."""
        return PAST_PREFIX + self.place

    @property
    def present(self) -> str:
        """The name of a step's output with its next value."""
        return PRESENT_PREFIX + self.place


def slot_of(name: str) -> CacheSlot | None:
    """Return the slot in the name of an export's input or output; None for any other value."""
    place = next((name.removeprefix(prefix) for prefix in (PAST_PREFIX, PRESENT_PREFIX) if name.startswith(prefix)), "")
    layer, *rest = place.split(".")
    part = rest.pop(0) if rest and rest[0] in ("decoder", "encoder") else ""
    number = int(rest.pop()) if len(rest) > 1 and rest[-1].isdigit() else 0
    kind = kinds_shown(rest).get(rest[0]) if layer.isdigit() and len(rest) == 1 else None
    return None if kind is None else CacheSlot(int(layer), kind, number, part)


def past_slots(values: Iterable[Any]) -> dict[CacheSlot, Any]:
    """Return the cached tensors among a graph's inputs, by slot."""
    named = ((slot_of(str(value.name)), value) for value in values if str(value.name).startswith(PAST_PREFIX))
    return {slot: value for slot, value in named if slot is not None}


def keeps_state(slots: Iterable[CacheSlot]) -> bool:
    """Return whether a cache has states of a fixed size, which cannot be cut back to fewer tokens."""
    return any(slot.kind.grows is None for slot in slots)
