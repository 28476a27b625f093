"""Locations in an export of the stacks of matrices that an adapter changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.base.features import parts
from gralora_fx.core.adapters.parameter_keys import names_parameter, parameters_in
from gralora_fx.core.adapters.stored_adapter import StoredAdapter
from gralora_fx.core.methods.method import Update
from gralora_fx.errors import CheckpointError, MergeError, bulleted, command, marked
from gralora_fx.exporters.fold.edits import StackEdit
from gralora_fx.exporters.rules.products.initializers import initializer_names, initializers

_NOT_FOUND = (
    "no initializer of floats has the name of its parameter, as in an export that quantizes it; export the model "
    f"with the adapter merged, which quantizes afterwards ({command('export_onnx')} with the adapter)"
)


class Arrangement(Protocol):
    """The layout in which an export's operator stores the matrices of a stack; equal objects have equal layouts."""

    def as_modelled(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Return a stored matrix as the model has it, `[out, in]`; it may be a view."""
        ...

    def as_stored(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Return the model's matrix as it is stored."""
        ...


@dataclass(frozen=True)
class Transposed:
    """Matrices that are stored `[in, out]`."""

    def as_modelled(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Return the matrix transposed."""
        return matrix.T

    def as_stored(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Return the matrix transposed."""
        return matrix.T


@dataclass(frozen=True)
class StackLocation:
    """An initializer with the matrices of a parameter."""

    path: str  # the parameter
    file: str  # the ONNX file
    value: ir.Value  # the initializer, `[stack, ...]`
    shape: tuple[int, int]  # `[out, in]` of a matrix, as the adapter has it
    arrangement: Arrangement | None = None  # their layout; None if it is the adapter's

    def edit(self, update: Callable[[], Update]) -> StackEdit:
        """Return the edit that adds an update to the stack's matrices."""
        assert self.value.shape is not None
        _, *stored = (int(size) for size in self.value.shape.numpy())
        new = StackEdit(self.path, update, self.shape, tuple(stored))
        if self.arrangement is None:
            return new
        at = self.arrangement
        return dataclasses.replace(new, as_modelled=at.as_modelled, as_stored=at.as_stored)


def named_by_export(graphs: Mapping[str, ir.Graph], adapter: StoredAdapter) -> StoredAdapter:
    """Return an adapter whose parameters are named after an export's initializers, as far as widths identify them."""
    names = initializer_names(graphs.values())
    shapes = {name: found for graph in graphs.values() for name in names if (found := _possible_features(graph, name))}
    order: list[str] = []
    for module, paths in parameters_in(adapter.unnamed, adapter.config).items():
        own = [n for n in shapes if n.rpartition(".")[0] == module and names_parameter(adapter.config, n)]
        if len(own) < len(paths):
            raise MergeError(f"{module}: {_NOT_FOUND}")
        for path in paths:
            features = adapter.features_of(adapter.unnamed[path])
            fitting = [name for name in own if features in shapes[name]]
            if len(fitting) != 1 or len(own) > len(paths):
                raise MergeError(
                    f"nothing says which parameter of {module} the tensors {path} of {adapter.directory} are of; load "
                    "the adapter into its model (GraloraModel.from_pretrained), save it again, and fold that"
                )
            order += fitting
    try:
        return adapter.named(order)
    except CheckpointError as error:
        raise MergeError(marked(error)) from error


def find_stacks(graphs: Mapping[str, ir.Graph], adapter: StoredAdapter) -> list[StackLocation]:
    """Return where the parameters of an adapter lie; one may lie in several files."""
    found: list[StackLocation] = []
    problems: list[str] = []
    for path in adapter.parameters:
        try:
            of_path = [location for file, graph in graphs.items() for location in _at(graph, file, path, adapter)]
        except MergeError as error:
            problems.append(f"{path}: {marked(error)}")
        else:
            found += of_path
            if not of_path:
                problems.append(f"{path}: {_NOT_FOUND}")
    if problems:
        raise MergeError(f"{adapter.directory} cannot be folded into this export:\n{bulleted(problems)}")
    return found


def _at(graph: ir.Graph, file: str, path: str, adapter: StoredAdapter) -> Iterator[StackLocation]:
    """Yield the location of a parameter in a graph, if it is there."""
    value = next((value for value in initializers(graph) if value.name == path), None)
    if value is None or value.shape is None:
        return
    site = adapter.sites[path]
    if site.stack is None or len(value.shape) != 3:
        raise MergeError("it is a single matrix that no product of the export reads; export the merged model instead")
    stored = tuple(int(size) for size in value.shape.numpy())
    matrix = site.features[1], site.features[0]
    arrangement = arrangement_of(value)
    if arrangement is not None:
        if stored[0] != site.stack or arrangement.as_modelled(np.empty(stored[1:], np.bool_)).shape != matrix:
            raise MergeError(_unfit(stored, site.stack, matrix))
        yield StackLocation(path, file, value, matrix, arrangement)
        return
    transposed = (site.stack, *matrix[::-1])
    if stored not in ((site.stack, *matrix), transposed):
        raise MergeError(_unfit(stored, site.stack, matrix))
    if matrix[0] == matrix[1]:
        raise MergeError(
            "nothing says whether its square matrices are stored [in, out]; export the merged model instead"
        )
    yield StackLocation(path, file, value, matrix, Transposed() if stored == transposed else None)


def arrangement_of(value: ir.Value) -> Arrangement | None:
    """Return the layout of an initializer that a feature's operator reads; None for other operators."""
    use = next(iter(value.uses()), None)
    found = [] if use is None else [arrangement_at(use.node, use.idx) for arrangement_at in parts("arrangements")]
    return next((arrangement for arrangement in found if arrangement is not None), None)


def _possible_features(graph: ir.Graph, name: str) -> set[tuple[int, int]]:
    """Return possible widths in and out of an initializer's matrices; none if it is not a stack."""
    value = graph.initializers.get(name)
    if value is None or value.shape is None or len(value.shape) != 3:
        return set()
    rows, columns = (int(size) for size in value.shape.numpy()[1:])
    arrangement = arrangement_of(value)
    if arrangement is not None:
        return {(columns, arrangement.as_modelled(np.empty((rows, 1), np.bool_)).shape[0])}
    return {(columns, rows), (rows, columns)}


def _unfit(stored: tuple[int, ...], stack: int, matrix: tuple[int, int]) -> str:
    return (
        f"the export has {stored[0]} matrices of {list(stored[1:])}, and the adapter {stack} of {list(matrix)}; give "
        "an adapter of the export's base"
    )
