"""The arrays of a call: its inputs, checked and with defaults filled in, and its outputs by name and by index."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, an
from gralora_fx.format.cache_slots import past_slots
from gralora_fx.format.input_names import EMBEDS, GIVEN, IDS, PAST, StepInput, beside_ids, packed_problem
from gralora_fx.format.size_limits import SizeLimit, first_problem
from gralora_fx.run.engine.limits import context_length
from gralora_fx.run.sessions.ort_values import DTYPES, as_array, plain_array
from gralora_fx.run.sessions.session_views import empty_past

if TYPE_CHECKING:  # loaded only for models with inputs of features
    from gralora_fx.format.input_names import InputFacts

_CACHED, _NEW, _ALL = "past_sequence_length", "sequence_length", "total_sequence_length"


@dataclass(frozen=True)
class CallInputs:
    """Converts a call's inputs to those of a session."""

    inputs: Mapping[str, Any]  # the session's inputs by name, each with its type and shape
    config: Mapping[str, Any] = field(default_factory=dict)  # fields of the model's `config.json`
    is_encoder_decoder: bool = False  # whether the session is an `EncoderDecoderSession`
    # how many positions the model lacks of those in its configuration; if not 0, padding takes none
    position_offset: int = 0
    # facts about inputs, recorded by features, by their names in the manifest
    facts: Mapping[str, InputFacts] = field(default_factory=dict)
    limits: tuple[SizeLimit, ...] = ()  # conditions on sizes that the manifest records
    task: str | None = None  # the task that the model was exported for

    def parts(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Flatten the inputs to the session's names: a list, tuple, dict or dataclass becomes its parts, by path."""
        return {path: part for name, value in inputs.items() for path, part in self._parts(str(name), value)}

    def arrays(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Return arrays for every input of the session."""
        shown = [name for name in self.inputs if not name.startswith(f"{PAST}.")]
        cache = [f"{PAST}..."] if len(shown) < len(self.inputs) else []
        takes = f"the model takes {', '.join([*shown, *cache])}"
        if unknown := [str(name) for name in inputs if name not in self.inputs]:
            raise ServingError(f"unknown input {', '.join(unknown)}; {takes}, so leave out what it does not take")
        arrays = {name: self._array(name, value) for name, value in inputs.items()}
        self._check_ids(arrays)
        pasts = [name for name in self.inputs if name.startswith(f"{PAST}.")]
        if arrays and not any(name in arrays for name in pasts):
            axes = {name: each.axis for name, each in self._beside.items()}
            found = ((array, axes.get(name, 0)) for name, array in arrays.items() if array.ndim)
            batch = next((array.shape[axis] for array, axis in found if axis is not None), 1)
            arrays |= empty_past(tuple(self.inputs.values()), batch)
        cached = None
        if not self.is_encoder_decoder and pasts:
            slots = past_slots(self.inputs.values())
            growing = [(slot.past, axis) for slot in slots if (axis := slot.kind.grows) is not None][:2]
            if all(name in arrays for name, _ in growing):
                cached = next((arrays[name].shape[axis] for name, axis in growing), 0)
        for name in self.inputs:
            if name not in arrays and name not in self._beside:
                default = default_array(name, arrays, cached)
                if default is None:
                    raise ServingError(f"input {name!r} is missing; {takes}")
                arrays[name] = default
        self._check_equal_axes(arrays)
        self._check_length(arrays)
        check_limits(self.limits, {name: array.shape for name, array in arrays.items()})
        if "position_ids" in inputs and (problem := packed_problem(self.task, arrays)) is not None:
            raise ServingError(problem)
        return arrays

    @cached_property
    def _beside(self) -> Mapping[str, StepInput]:
        """Inputs of a decoder beside ids, which text does not need; an id of -1 marks positions where they are read."""
        return beside_ids(self.inputs)

    def _array(self, name: str, value: Any) -> NDArray[Any]:
        for facts in self.facts.values():
            shape = plain_array(name, value).shape if facts.input == name else (0,)
            if 0 not in shape and (problem := facts.problem(shape, self.inputs[name].shape)):  # an empty one: see below
                raise ServingError(f"input {name!r} {problem}")
        if name.startswith(f"{PAST}."):
            _check_cached(name, value, DTYPES.get(self.inputs[name].type))
        return as_array(name, value, self.inputs[name])

    def _parts(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if name in self.inputs or not any(path.startswith(f"{name}.") for path in self.inputs):
            yield name, value
            return
        parts: Mapping[Any, Any] = dict(enumerate(value)) if isinstance(value, (list, tuple)) else {}
        if isinstance(value, Mapping):
            parts = value
        elif not parts and dataclasses.is_dataclass(value):
            parts = vars(value)
        if not parts:
            raise ServingError(f"input {name!r} is {an(type(value).__name__)}; give a list, tuple or dict of its parts")
        for key, part in parts.items():
            yield from self._parts(f"{name}.{key}", part)

    def _check_ids(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Check the range of ids, which ONNX Runtime would count from the end if negative, and the values of masks."""
        vocabulary = _text_field(self.config, "vocab_size")
        types = _text_field(self.config, "type_vocab_size")
        for name, array in arrays.items():
            if name.endswith("attention_mask") and array.dtype.kind == "i" and not np.isin(array, (0, 1)).all():
                raise ServingError(f"input {name!r} must be 1 where a position counts and 0 where it is padding")
            if not name.endswith("_ids") or not array.size:
                continue
            if array.min() < (GIVEN if self._beside and name in (IDS, *self._beside) else 0):
                raise ServingError(f"input {name!r} holds {array.min()}, but ids are 0 or more; mask padding instead")
            if name.endswith("input_ids") and isinstance(vocabulary, int) and array.max() >= vocabulary:
                raise ServingError(
                    f"input {name!r} holds token {array.max()}, outside the vocabulary of {vocabulary} tokens"
                )
            if name == "token_type_ids" and isinstance(types, int) and array.max() >= types > 0:
                raise ServingError(f"input {name!r} holds {array.max()}, but the model has {types} types, from 0")

    def _check_equal_axes(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Check that axes of the same name have the same size, since ONNX Runtime would run some that differ."""
        seen: dict[str, tuple[str, int]] = {}
        for name, array in arrays.items():
            for axis, size in zip(self.inputs[name].shape, array.shape, strict=True):
                if isinstance(axis, str):
                    other, expected = seen.setdefault(axis, (name, size))
                    if size != expected:
                        raise ServingError(
                            f"input {name!r} has {axis} {size}, but {other!r} has {expected}; give inputs of one size"
                        )
        if all(axis in seen for axis in (_ALL, _CACHED, _NEW)):
            (name, total), (_, past), (_, new) = (seen[axis] for axis in (_ALL, _CACHED, _NEW))
            if total != past + new:
                raise ServingError(
                    f"input {name!r} has shape {list(arrays[name].shape)}, but {past} cached and {new} new positions "
                    f"need [{arrays[name].shape[0]}, {past + new}]; give a mask over all of them"
                )

    def _check_length(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Check the number of positions, since a model that computes its positions would answer, but wrongly."""
        for name in ("input_ids", "decoder_input_ids"):
            ids, limit = arrays.get(name), context_length(self.config, name)
            if ids is None or limit is None or ids.ndim != 2:
                continue
            cached = 0
            if not self.is_encoder_decoder or name == "decoder_input_ids":
                slots = past_slots(value for value in self.inputs.values() if value.name in arrays)
                lengths = (arrays[slot.past].shape[slot.kind.grows] for slot in slots if slot.kind.grows is not None)
                cached = next(lengths, 0)
            length, limit = cached + ids.shape[1], limit - self.position_offset
            if self.position_offset:
                length = cached + int((ids != self.position_offset - 1).sum(1).max())
            if length > limit:
                after = f" after {cached} cached ones" if cached else ""
                raise ServingError(
                    f"input {name!r} has {length - cached} positions{after}, more than the context of {limit}; shorten "
                    "it, as a tokenizer does with truncation=True and max_length"
                )


def check_limits(limits: Iterable[SizeLimit], shapes: Mapping[str, Sequence[int]]) -> None:
    """Check the sizes of inputs, by path, against the limits of an export."""
    if limits and (problem := first_problem(limits, shapes)) is not None:
        raise ServingError(f"{problem}; give that, or export a trace of an example of the other size")


def default_array(name: str, arrays: Mapping[str, NDArray[Any]], cached: int | None = None) -> NDArray[Any] | None:
    """Return an input's default, as of a traced model (see `default_input`); None if it is required.

    Args:
        name: Its name.
        arrays: The other inputs so far.
        cached: Positions in a decoder's cache; None without a cache.
    """
    if name == IDS and EMBEDS in arrays:  # all of them are given
        return np.full(arrays[EMBEDS].shape[:2], GIVEN, np.int64)
    ids = arrays.get("decoder_input_ids" if name.startswith("decoder_") else IDS)
    if ids is None:
        return None
    if cached is not None:
        mask = arrays.get("attention_mask", np.ones((ids.shape[0], cached + ids.shape[1]), ids.dtype))
        positions = (mask.astype(np.int64).cumsum(-1) - 1).clip(0)
        new = positions[:, positions.shape[1] - ids.shape[1] :]
        return mask if name == "attention_mask" else new if name == "position_ids" else None
    if name == "position_ids":
        return np.broadcast_to(np.arange(ids.shape[-1]), ids.shape).copy()
    fills = {"attention_mask": 1, "decoder_attention_mask": 1, "token_type_ids": 0}
    return np.full(ids.shape, fills[name], ids.dtype) if name in fills else None


def _check_cached(name: str, value: Any, dtype: np.dtype[Any] | None) -> None:
    """Check that a passed cache tensor has the model's dtype, which is None if NumPy lacks it."""
    array = plain_array(name, value)
    if dtype is not None and hasattr(value, "dtype") and array.dtype != dtype:
        raise ServingError(
            f"input {name!r} is {array.dtype}, but the model keeps its cache in {dtype}; give what a call returned"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ServingError(f"input {name!r} holds a value that is not finite; give what a call returned")


def _text_field(config: Mapping[str, Any], name: str) -> Any:
    text = config.get("text_config")
    return text.get(name, config.get(name)) if isinstance(text, Mapping) else config.get(name)


class Outputs(dict[str, Any]):
    """Output arrays, accessible as in transformers' `ModelOutput`: `outputs["logits"]`, `outputs.logits`, `outputs[0]`.

    Iteration yields names, as for every dict; use `outputs.to_tuple()` or `outputs[:]` for unpacking.
    """

    def __getitem__(self, key: Any) -> Any:
        """Return the output with a name or at an index, or a tuple for a slice."""
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        """Return the output called `name`."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are {', '.join(self)}") from None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the outputs in the order of the graph."""
        return tuple(self.values())
