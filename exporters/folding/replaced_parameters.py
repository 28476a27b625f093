"""Parameters that an adapter replaces as a whole: trained biases and those of `modules_to_save`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.adapters.stored_adapter import StoredAdapter
from gralora_fx.errors import MergeError, bulleted
from gralora_fx.exporters.folding.base_weights import holds
from gralora_fx.exporters.folding.edits import LayerEdit, ValuesEdit, constant
from gralora_fx.exporters.folding.initializer_names import foreign_names, parameter_names, ranges, reduced
from gralora_fx.exporters.folding.initializers import read_rows, rows_and_columns
from gralora_fx.exporters.folding.places import (
    Export,
    Place,
    is_named,
    named_places,
    places_by_value,
    recorded_places,
    unique,
)
from gralora_fx.exporters.folding.products import ProductWeight, Reader, initializers
from gralora_fx.exporters.folding.requantize import is_rounding_of

_WEIGHT = ".weight"


@dataclass(frozen=True)
class ValuePlace:
    """An initializer that holds a parameter which is not multiplied by.

    Attributes:
        name: The parameter.
        file: The ONNX file.
        value: The initializer.
        start: First of the parameter's values in a stored row.
        readers: The inputs that read it, those of products left out.
        is_shared: Whether products read it too, which keep their values.
    """

    name: str
    file: str
    value: ir.Value
    start: int
    readers: tuple[Reader, ...]
    is_shared: bool


@dataclass(frozen=True)
class Replacements:
    """What replaces parameters.

    Attributes:
        layers: Weights of linear layers: where they lie, and what happens there.
        values: Other parameters: likewise.
    """

    layers: tuple[tuple[Place, LayerEdit], ...]
    values: tuple[tuple[ValuePlace, ValuesEdit], ...]


def find_replacements(export: Export, adapter: StoredAdapter, adapted: Iterable[Place]) -> Replacements:
    """Where the parameters lie that an adapter replaces; those that it only repeats are compared.

    Args:
        export: The export.
        adapter: The adapter.
        adapted: The places of its adapted layers, whose weights it may repeat.

    Raises:
        MergeError: A parameter is not found, has another shape, is shared with others, or one that should repeat the
            base's does not; all are named.
    """
    layers: list[tuple[Place, LayerEdit]] = []
    values: list[tuple[ValuePlace, ValuesEdit]] = []
    problems: list[str] = []
    for name, trained in adapter.copies.items():
        try:
            tensor = trained.array()
            found = list(_layer_edits(export, name, tensor))
            layers += found
            values += [] if found else _value_edits(export, name, tensor)
        except MergeError as error:
            problems.append(f"{name}: {error}")
    known: dict[str, list[Place]] = {}
    for place in adapted:
        known.setdefault(place.path, []).append(place)
    for name, repeated in adapter.repeats.items():
        if not _repeats(export, known, name, repeated.array()):
            problems.append(f"{name}: the adapter holds values for it that are not the export's, and does not train it")
    if problems:
        raise MergeError(f"parameters of {adapter.directory} cannot be written into this export:\n{bulleted(problems)}")
    return Replacements(tuple(layers), tuple(values))


def _layer_edits(export: Export, name: str, tensor: NDArray[Any]) -> Iterator[tuple[Place, LayerEdit]]:
    """Places of a parameter that is the weight of a linear layer, and what happens there."""
    path = name.removesuffix(_WEIGHT)
    if tensor.ndim != 2 or path == name:
        return
    places = _weight_places(export, path)
    if not places and export.manifest is None and not any(named_values(export, name)):
        outputs, inputs = tensor.shape  # an unnamed matrix is a linear layer's transposed weight
        places = list(places_by_value(export, path, (inputs, outputs)))
    for place in places:
        shape = [place.stop - place.start, place.weight.in_features]
        matrix = _as_matrix(export, place, tensor, shape)
        if list(matrix.shape) != shape:
            raise MergeError(f"it has shape {list(matrix.shape)} in the adapter and {shape} in {place.weight.name}")
        if place.weight.problem:
            raise MergeError(f"{place.weight.name} cannot be written: {place.weight.problem}")
        yield place, LayerEdit(path, place.start, place.stop, values=matrix)


def _weight_places(export: Export, path: str) -> list[Place]:
    """Places of a linear layer's weight, as recorded or by its exact name; none for other modules."""
    if export.record is not None:
        places = recorded_places(export, path)
        if sharing := export.sharing(places):
            raise MergeError(f"it is the weight of {', '.join(sharing)} too, which would change with it")
        return places
    places = list(named_places(export, path))
    if not places and export.manifest is None:  # under a prefix, as of a model within another module
        places = list(named_places(export, path, foreign=True))
        places = [] if len(places) > 1 and export.base is not None else unique(places)  # else its values tell
    for place in places:
        if place.weight.others or len(place.weight.readers) > 1:
            raise MergeError(f"{place.weight.name} has several readers, and nothing says that all are of one layer")
    return places


def _as_matrix(export: Export, place: Place, tensor: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """A layer's trained weight as `[out, in]`, of `shape` if it fits.

    Raises:
        MergeError: Nothing says whether a square one has the layout of a linear layer or of transformers' `Conv1D`.
    """
    if export.manifest is not None or not place.weight.transposed:
        return tensor.T if export.is_conv1d(place.path) else tensor
    if shape[0] != shape[1]:
        return tensor if list(tensor.shape) == shape else tensor.T
    readings = () if export.base is None else export.base_values(place.path, (shape[1], shape[0]))
    found = [index for index, values in enumerate(readings) if holds(place.weight, place.start, values)]
    if not found:
        raise MergeError(f"nothing says whether {place.weight.name} is stored transposed; give base=...")
    return tensor.T if found[0] else tensor


def _value_edits(export: Export, name: str, tensor: NDArray[Any]) -> list[tuple[ValuePlace, ValuesEdit]]:
    """Places of any other parameter, and what happens there.

    Raises:
        MergeError: There are none, or what is there has another shape or other readers.
    """
    places = list(named_values(export, name))
    if not places:
        raise MergeError("no initializer of the export has its name; export the merged model instead")
    edits = []
    for place in places:
        if not place.readers and place.is_shared:
            raise MergeError(f"{place.value.name} is read by products alone; export the merged model instead")
        if export.record is None and (place.is_shared or len(place.readers) > 1):
            raise MergeError(f"{place.value.name} has several readers, and nothing says that all are of this module")
        assert place.value.shape is not None
        shape = [int(size) for size in place.value.shape.numpy()]
        is_alone = place.value.name == name or str(place.value.name).endswith(f".{name}")
        if is_alone and list(tensor.shape) != shape:
            raise MergeError(f"it has shape {list(tensor.shape)} in the adapter and {shape} in the export")
        rows = tensor.reshape(rows_and_columns(place.value)[0], -1)
        edits.append((place, ValuesEdit(name, constant(rows), place.start)))
    return edits


def named_values(export: Export, name: str) -> Iterator[ValuePlace]:
    """Places of a parameter by its name, alone in an initializer or beside others.

    Args:
        export: The export.
        name: The parameter.

    Raises:
        MergeError: None has the name itself, and several of a file of another exporter end with it.
    """
    found = list(_named_values(export, name, foreign=False))
    if not found and export.manifest is None:
        found = list(_named_values(export, name, foreign=True))
        for file in {place.file for place in found}:
            names = [str(place.value.name) for place in found if place.file == file]
            if len(names) > 1:
                raise MergeError(f"it may be any of {', '.join(names)} in {file}; export the merged model instead")
    yield from found


def _named_values(export: Export, name: str, *, foreign: bool) -> Iterator[ValuePlace]:
    wanted = reduced(name) if foreign else name
    widths = {f"{path}.bias": width for path, width in export.widths.items()}
    for file, graph in export.graphs.items():
        products = {id(weight.value): weight for weight in export.weights[file]}
        for value in initializers(graph):
            product = products.get(id(value))
            readings = foreign_names(value) if foreign else parameter_names(value)
            found = next(((names, own) for names in readings for own in names if is_named(own, wanted, foreign)), None)
            if found is None:
                continue
            names, own = found
            parts = [(0, 0)] if len(names) == 1 else list(ranges(names, rows_and_columns(value)[1], widths.get))
            if parts:
                uses = tuple(Reader(use.node, use.idx) for use in value.uses())
                readers = uses if product is None else product.others
                yield ValuePlace(name, file, value, parts[names.index(own)][0], readers, product is not None)


def _repeats(export: Export, known: Mapping[str, list[Place]], name: str, tensor: NDArray[Any]) -> bool:
    """Whether the export holds these values of a parameter already."""
    path = name.removesuffix(_WEIGHT)
    places = known.get(path) or (_weight_places(export, path) if path != name else [])
    if places and tensor.ndim == 2:
        matrix = tensor.T if export.is_conv1d(path) else tensor
        return all(_holds(place.weight, place.start, matrix) for place in places)
    found = list(named_values(export, name))
    return bool(found) and all(_equal(place, tensor) for place in found)


def _holds(weight: ProductWeight, start: int, matrix: NDArray[Any]) -> bool:
    if matrix.shape[1] != weight.in_features or start + len(matrix) > weight.out_features:
        return False
    return holds(weight, start, matrix) if weight.storage == "float" else is_rounding_of(weight, start, matrix)


def _equal(place: ValuePlace, tensor: NDArray[Any]) -> bool:
    rows = read_rows(place.value)
    if tensor.size % len(rows):
        return False
    expected = tensor.reshape(len(rows), -1)
    found = rows[:, place.start : place.start + expected.shape[1]]
    return found.shape == expected.shape and np.array_equal(found, expected.astype(found.dtype))
