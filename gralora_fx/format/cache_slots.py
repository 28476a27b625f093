"""The tensors that a model keeps between its steps: kinds of state, and the names of each tensor in an export."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gralora_fx.base.features import parts
from gralora_fx.format.input_names import PAST_PREFIX, PRESENT_PREFIX


@dataclass(frozen=True)
class StateKind:
    """A kind of tensor that a layer keeps between steps; its first axis is the batch.

    Attributes:
        name: What the names of inputs and outputs call it.
        attribute: Where a layer of transformers' cache holds it: a tensor, or a dict of several by their number.
        grows: The axis of positions, which a step makes longer; None of a state whose size is fixed, of which a step
            gives the next. Such a state is zeros before the first step.
        axes: What an export calls its axes, the last of which may have fixed sizes.
        sums_up: Whether it sums up all positions, one after the other. Exports in half precision keep it in float32,
            since rounding would add up over a text, and positions of padding take as long as others.
        is_window: Whether its last axis holds the last inputs of a layer, of which a model may keep one more, the
            oldest, than a step reads again.
        beside: Where some models' caches hold it beside their layers: the name of a list with an item for each layer.
    """

    name: str
    attribute: str
    grows: int | None = None
    axes: tuple[str, ...] = ("batch_size",)
    sums_up: bool = False
    is_window: bool = False
    beside: str = ""

    def shape(self, like: Sequence[Any], batch: int, length: int) -> tuple[int, ...]:
        """The shape of one for a number of rows and positions."""
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
        # [batch, positions, size], by which sparse attention chooses its keys
        StateKind("indexer", "indexer_keys", grows=1, axes=("batch_size", "past_sequence_length", "index_size")),
    )
}


def kinds_shown(signs: Collection[str]) -> dict[str, StateKind]:
    """Return the kinds of state by name, with those of the features that some signs show."""
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
    kind: StateKind  # what it is
    number: int = 0  # which one, of several of the kind in a layer
    part: str = ""  # of an encoder-decoder's cache: `"decoder"` or `"encoder"`; else empty

    @property
    def place(self) -> str:
        """Its name without the prefix, such as `3.conv`."""
        parts = [str(self.layer), self.part, self.kind.name, str(self.number) if self.number else ""]
        return ".".join(part for part in parts if part)

    @property
    def past(self) -> str:
        """The name of the input of a step that takes it."""
        return PAST_PREFIX + self.place

    @property
    def present(self) -> str:
        """The name of the output of a step that gives the next one."""
        return PRESENT_PREFIX + self.place


def slot_of(name: str) -> CacheSlot | None:
    """The slot that an input or output of an export is called after; None of any other value."""
    place = next((name.removeprefix(prefix) for prefix in (PAST_PREFIX, PRESENT_PREFIX) if name.startswith(prefix)), "")
    layer, *rest = place.split(".")
    part = rest.pop(0) if rest and rest[0] in ("decoder", "encoder") else ""
    number = int(rest.pop()) if len(rest) > 1 and rest[-1].isdigit() else 0
    kind = kinds_shown(rest).get(rest[0]) if layer.isdigit() and len(rest) == 1 else None
    return None if kind is None else CacheSlot(int(layer), kind, number, part)


def past_slots(values: Iterable[Any]) -> dict[CacheSlot, Any]:
    """The cached tensors among a graph's inputs, by slot."""
    named = ((slot_of(str(value.name)), value) for value in values if str(value.name).startswith(PAST_PREFIX))
    return {slot: value for slot, value in named if slot is not None}


def keeps_state(slots: Iterable[CacheSlot]) -> bool:
    """Return whether a cache has states of a fixed size, which cannot be cut to those of fewer tokens."""
    return any(slot.kind.grows is None for slot in slots)
