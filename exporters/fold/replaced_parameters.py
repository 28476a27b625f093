"""Parameters that an adapter replaces as a whole: trained biases and those of `modules_to_save`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.base.sources.safetensors_files import StoredTensor, are_same
from gralora_fx.core.adapters.stored_adapter import StoredAdapter
from gralora_fx.errors import MergeError, bulleted, marked, option
from gralora_fx.exporters.fold.edits import LayerEdit, ValuesEdit, constant
from gralora_fx.exporters.fold.matching_weights import foreign_names, holds, ranges, reduced
from gralora_fx.exporters.fold.requantize import is_rounding_of
from gralora_fx.exporters.fold.weight_locations import (
    Export,
    WeightLocation,
    is_named,
    locations_by_value,
    named_locations,
    recorded_locations,
    unique,
)
from gralora_fx.exporters.rules.products.initializers import ProductWeight, Reader, initializers, parameter_names
from gralora_fx.exporters.rules.products.stored_rows import read_rows, rows_and_columns

_WEIGHT = ".weight"


@dataclass(frozen=True)
class ValueLocation:
    """An initializer that holds a parameter which no product multiplies by."""

    name: str  # the parameter
    file: str  # the ONNX file
    value: ir.Value  # the initializer
    start: int  # first of the parameter's values in a stored row
    readers: tuple[Reader, ...]  # the node inputs that read it, except products
    is_shared: bool  # whether products read it too; they keep the old values


@dataclass(frozen=True)
class Replacements:
    """The parameters that an adapter replaces."""

    # weights of linear layers: their locations and edits
    layers: tuple[tuple[WeightLocation, LayerEdit], ...]
    values: tuple[tuple[ValueLocation, ValuesEdit], ...]  # other parameters: their locations and edits


def find_replacements(export: Export, adapter: StoredAdapter, adapted: Iterable[WeightLocation]) -> Replacements:
    """Locate the parameters that an adapter replaces; compare those that it only repeats."""
    known: dict[str, list[WeightLocation]] = {}
    for location in adapted:
        known.setdefault(location.path, []).append(location)

    def is_of_export(name: str, saved: StoredTensor) -> bool:
        return _repeats(export, known, name, saved.array())

    adapter = adapter.with_own_embeddings(is_of_export)
    layers: list[tuple[WeightLocation, LayerEdit]] = []
    values: list[tuple[ValueLocation, ValuesEdit]] = []
    problems: list[str] = []
    for name, trained in adapter.copies.items():
        try:
            tensor = trained.array()
            edits = list(_layer_edits(export, name, tensor))
            layers += edits
            values += [] if edits else _value_edits(export, name, tensor)
        except MergeError as error:
            problems.append(f"{name}: {marked(error)}")
    for name, repeated in adapter.repeats.items():
        if not _repeats(export, known, name, repeated.array()):
            problems.append(f"{name}: the adapter holds values for it that are not the export's, and does not train it")
    if problems:
        raise MergeError(f"parameters of {adapter.directory} cannot be written into this export:\n{bulleted(problems)}")
    return Replacements(tuple(layers), tuple(values))


def _layer_edits(export: Export, name: str, tensor: NDArray[Any]) -> Iterator[tuple[WeightLocation, LayerEdit]]:
    """Return the locations of a parameter that is a linear layer's weight, with their edits."""
    path = name.removesuffix(_WEIGHT)
    if tensor.ndim != 2 or path == name:
        return
    locations = _weight_locations(export, path)
    if not locations and export.manifest is None and not any(named_values(export, name)):
        outputs, inputs = tensor.shape  # an unnamed matrix is a linear layer's transposed weight
        locations = list(locations_by_value(export, path, (inputs, outputs)))
    for location in locations:
        shape = [location.stop - location.start, location.weight.in_features]
        matrix = _as_matrix(export, location, tensor, shape)
        if list(matrix.shape) != shape:
            raise MergeError(f"it has shape {list(matrix.shape)} in the adapter and {shape} in {location.weight.name}")
        if location.weight.problem:
            raise MergeError(f"{location.weight.name} cannot be written: {location.weight.problem}")
        yield location, LayerEdit(path, location.start, location.stop, values=matrix)


def _weight_locations(export: Export, path: str) -> list[WeightLocation]:
    """Return the locations of a linear layer's weight, as recorded or by exact name; none for other modules."""
    if export.record is not None:
        locations = recorded_locations(export, path)
        if sharing := export.sharing(locations):
            raise MergeError(f"it is the weight of {', '.join(sharing)} too, which would change with it")
        return locations
    locations = list(named_locations(export, path))
    if not locations and export.manifest is None:  # under a prefix, as of a model within another module
        locations = list(named_locations(export, path, foreign=True))
        locations = [] if len(locations) > 1 and export.base is not None else unique(locations)
    for location in locations:
        if location.weight.others or len(location.weight.readers) > 1:
            raise MergeError(f"{location.weight.name} has several readers, and nothing says that all are of one layer")
    return locations


def _as_matrix(export: Export, location: WeightLocation, tensor: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """Return a layer's trained weight as `[out, in]`; raise a `MergeError` if the layout is unknown."""
    if export.manifest is not None or not location.weight.transposed:
        return tensor.T if export.is_conv1d(location.path) else tensor
    if shape[0] != shape[1]:
        return tensor if list(tensor.shape) == shape else tensor.T
    readings = () if export.base is None else export.base_values(location.path, (shape[1], shape[0]))
    fitting = [index for index, values in enumerate(readings) if holds(location.weight, location.start, values)]
    if not fitting:
        raise MergeError(f"nothing says whether {location.weight.name} is stored transposed; give {option(base=...)}")
    return tensor.T if fitting[0] else tensor


def _value_edits(export: Export, name: str, tensor: NDArray[Any]) -> list[tuple[ValueLocation, ValuesEdit]]:
    """Return the locations of any other parameter, with their edits."""
    locations = list(named_values(export, name))
    if not locations:
        raise MergeError("no initializer of the export has its name; export the merged model instead")
    edits = []
    for location in locations:
        if not location.readers and location.is_shared:
            raise MergeError(f"{location.value.name} is read by products alone; export the merged model instead")
        if export.record is None and (location.is_shared or len(location.readers) > 1):
            raise MergeError(f"{location.value.name} has several readers, and nothing says that all are of this module")
        assert location.value.shape is not None
        shape = [int(size) for size in location.value.shape.numpy()]
        is_alone = location.value.name == name or str(location.value.name).endswith(f".{name}")
        if is_alone and list(tensor.shape) != shape:
            raise MergeError(f"it has shape {list(tensor.shape)} in the adapter and {shape} in the export")
        rows = tensor.reshape(rows_and_columns(location.value)[0], -1)
        edits.append((location, ValuesEdit(name, constant(rows), location.start)))
    return edits


def named_values(export: Export, name: str) -> Iterator[ValueLocation]:
    """Yield the locations of a parameter by name, alone in an initializer or beside others."""
    locations = list(_named_values(export, name, foreign=False))
    if not locations and export.manifest is None:
        locations = list(_named_values(export, name, foreign=True))
        for file in {location.file for location in locations}:
            names = [str(location.value.name) for location in locations if location.file == file]
            if len(names) > 1:
                raise MergeError(f"it may be any of {', '.join(names)} in {file}; export the merged model instead")
    yield from locations


def _named_values(export: Export, name: str, *, foreign: bool) -> Iterator[ValueLocation]:
    wanted = reduced(name) if foreign else name
    widths = {f"{path}.bias": width for path, width in export.widths.items()}
    for file, graph in export.graphs.items():
        products = {id(weight.value): weight for weight in export.weights[file]}
        for value in initializers(graph):
            product = products.get(id(value))
            readings = foreign_names(value) if foreign else parameter_names(value)
            match = next(((names, own) for names in readings for own in names if is_named(own, wanted, foreign)), None)
            if match is None:
                continue
            names, own = match
            parts = [(0, 0)] if len(names) == 1 else list(ranges(names, rows_and_columns(value)[1], widths.get))
            if parts:
                uses = tuple(Reader(use.node, use.idx) for use in value.uses())
                readers = uses if product is None else product.others
                yield ValueLocation(name, file, value, parts[names.index(own)][0], readers, product is not None)


def _repeats(export: Export, known: Mapping[str, list[WeightLocation]], name: str, tensor: NDArray[Any]) -> bool:
    """Return whether the export already holds these values of a parameter."""
    path = name.removesuffix(_WEIGHT)
    locations = known.get(path) or (_weight_locations(export, path) if path != name else [])
    if locations and tensor.ndim == 2:
        matrix = tensor.T if export.is_conv1d(path) else tensor
        return all(_holds(location.weight, location.start, matrix) for location in locations)
    values = list(named_values(export, name))
    return bool(values) and all(_equal(location, tensor) for location in values)


def _holds(weight: ProductWeight, start: int, matrix: NDArray[Any]) -> bool:
    if matrix.shape[1] != weight.in_features or start + len(matrix) > weight.out_features:
        return False
    if weight.storage != "float":
        return is_rounding_of(weight, start, matrix)
    rows, own = read_rows(weight.value), slice(start, start + len(matrix))
    return are_same(rows[:, own].T if weight.transposed else rows[own], matrix)


def _equal(location: ValueLocation, tensor: NDArray[Any]) -> bool:
    rows = read_rows(location.value)
    if tensor.size % len(rows):
        return False
    expected = tensor.reshape(len(rows), -1)
    stored = rows[:, location.start : location.start + expected.shape[1]]
    return are_same(stored, expected)
