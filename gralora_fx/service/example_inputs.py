"""Single-row example inputs for a model that runs once per request: for adapter trials and for documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError
from gralora_fx.run.call_arrays import default_array
from gralora_fx.service.adapter_store.store import AdapterTrial
from gralora_fx.service.encoder import Encoder
from gralora_fx.service.protocols.inference.requests import datatype_of

_TEXTS = ("An example", "a")  # the second for very short contexts
_SIZES = (4, 1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)  # sizes of dynamic axes, in this order
_MOST_VALUES = 2**22  # maximum values of an input with dynamic axes
_RAMP = 10  # different floats: equal ones may make a singular matrix
_FILLS: tuple[float | None, ...] = (None, 1, 0, 0.5)  # None for different ones

Arrays = dict[str, NDArray[Any]]


def try_encoder(encoder: Encoder) -> AdapterTrial:
    """Return a trial that runs the model with example inputs that the base accepts."""
    inputs: Arrays = {}

    def run(key: str | None) -> list[NDArray[Any]]:
        if not inputs:
            inputs.update(example_inputs(encoder))
        return list(encoder.model(**inputs, adapter=key).values())

    return AdapterTrial(run, encoder.model)


def example_inputs(encoder: Encoder) -> Arrays:
    """Find single-row values for all inputs that the base accepts and whose outputs are finite."""
    problem: ServingError | None = None
    for inputs in _candidates(encoder):
        try:
            outputs = encoder.model(**inputs, adapter=None)
        except ServingError as error:
            problem = problem or error
            continue
        if all(output.dtype.kind != "f" or np.isfinite(output).all() for output in outputs.values()):
            return inputs
    raise ServingError(f"no inputs are known that the model could be tried with ({problem or 'no output is finite'})")


def _candidates(encoder: Encoder) -> Iterator[Arrays]:
    if encoder.takes_texts:
        for text in _TEXTS:
            try:
                tokens = encoder.reader.texts([text])
            except ServingError:  # it is too long, or has a letter that the tokenizer does not know
                continue
            yield _filled(encoder, encoder.reader.padded(tokens), 4, None)
    for size in _SIZES:
        axes = _axes(encoder, size)
        free = [value for value in encoder.inputs.values() if not all(isinstance(axis, int) for axis in value.shape)]
        if any(prod(_shape(value, axes, size)) > _MOST_VALUES for value in free):
            return
        for fill in _FILLS:
            yield _filled(encoder, {}, size, fill)


def _filled(encoder: Encoder, known: Mapping[str, Any], size: int, fill: float | None) -> Arrays:
    """Complete known inputs with defaults, and the rest with values of a given size."""
    axes = _axes(encoder, size)
    arrays: Arrays = {}
    # ids first, since defaults derive from them
    for name, value in sorted(encoder.inputs.items(), key=lambda pair: not pair[0].endswith("input_ids")):
        dtype = datatype_of(value).dtype
        default = default_array(name, {other: array for other, array in arrays.items() if other.endswith("input_ids")})
        if name in known:
            array = known[name]
        elif default is not None:
            array = default
        else:
            array = _values(name, _shape(value, axes, size), dtype, fill)
        arrays[name] = array.astype(dtype)
    return {name: arrays[name] for name in encoder.inputs}


def _axes(encoder: Encoder, size: int) -> dict[str, int]:
    """Return the size of each named axis."""
    axes: dict[str, int] = {}
    known = {facts.input: facts.smallest for facts in encoder.model.manifest.facts.values()}
    for name, value in encoder.inputs.items():
        sizes = [1, *[size] * (len(value.shape) - 1)]
        if name in known:
            sizes[-len(known[name]) :] = known[name]
        axes |= {axis: wanted for axis, wanted in zip(value.shape, sizes, strict=False) if isinstance(axis, str)}
    first = {value.shape[0] for value in encoder.inputs.values() if value.shape}
    return axes | {axis: 1 for axis in first if isinstance(axis, str)}


def _shape(value: Any, axes: Mapping[str, int], size: int) -> list[int]:
    return [axis if isinstance(axis, int) else axes.get(axis, size) for axis in value.shape]


def _values(name: str, shape: list[int], dtype: np.dtype[Any], fill: float | None) -> NDArray[Any]:
    if "mask" in name or dtype.kind == "b":
        return np.ones(shape, dtype)
    if fill is not None:
        return np.full(shape, fill, dtype)
    if dtype.kind != "f":
        return np.ones(shape, dtype)
    return ((np.arange(prod(shape)) % _RAMP) / _RAMP).reshape(shape).astype(dtype)
