"""What becomes of stored weights: updates folded in, or values replaced, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.rewriting import RowEdit
from gralora_fx.base.sources.safetensors_files import extremes_are_finite
from gralora_fx.core.adapters.stored_adapter import StoredAdapter
from gralora_fx.core.methods.fold import fold_region
from gralora_fx.core.methods.method import Update
from gralora_fx.errors import MergeError

NOT_FINITE = (
    "the folded weight of {name} is not finite in {dtype}; the adapter is damaged or too large for this precision, or "
    "is a DoRA adapter of a row of zeros, which has no norm; nothing was written"
)

_KEPT = 4  # updates of parameters that are in memory at once, since the parts of a parameter lie close together


@dataclass(frozen=True)
class LayerEdit:
    """What happens to a layer's weight `[out, in]` in a matrix: an update is added, or other values take its place."""

    name: str  # the layer, for messages
    start: int  # first of its output features in the matrix
    stop: int  # end of them
    update: Callable[[], Update] | None = None  # reads the update; None to take the values
    values: NDArray[Any] | None = None  # the values `[out, in]`
    takes_parts: bool = True  # whether parts of the weight can be changed apart, rather than the whole weight at once

    @classmethod
    def folding(cls, adapter: StoredAdapter, path: str, name: str, start: int, stop: int) -> Self:
        """An adapter's update added to the weight of a layer."""
        return cls(name, start, stop, partial(adapter.update, path), takes_parts=adapter.method.has_lora_form)

    def prepare(self, in_features: int, not_finite: str = NOT_FINITE) -> Callable[[NDArray[Any], slice, slice], None]:
        """Read the update; the result changes a part of the weight in place.

        It is given the part `[rows, columns]`, which may be a view, its output features, counted from the layer's
        first, and its input features.
        """
        updates = () if self.update is None else (self.update(),)

        def change(part: NDArray[Any], rows: slice, columns: slice) -> None:
            if self.values is not None:
                assign(part, self.values[rows, columns])
            else:
                fold_region(part, updates, rows, columns, (self.stop - self.start, in_features))
            check_finite(part, self.name, not_finite)

        return change


@dataclass(frozen=True)
class MatrixEdit:
    """What happens to a matrix of floats that holds the weights of one or several layers."""

    layers: tuple[LayerEdit, ...]  # what happens to each of them
    in_features: int  # input features of the matrix
    transposed: bool  # whether it is stored `[in, out]`
    not_finite: str = NOT_FINITE  # text of the error, as of `LayerEdit.prepare`

    @property
    def takes_rows(self) -> bool:
        """Whether some stored rows can be changed at a time, rather than all at once."""
        return all(layer.takes_parts for layer in self.layers)

    def prepare(self) -> RowEdit:
        """Read the updates; the result changes rows of the matrix as it is stored."""
        changes = [(layer, layer.prepare(self.in_features, self.not_finite)) for layer in self.layers]

        def change(rows: NDArray[Any], first: int) -> None:
            end = first + len(rows)
            for layer, apply in changes:
                if self.transposed:
                    apply(rows[:, layer.start : layer.stop].T, slice(0, layer.stop - layer.start), slice(first, end))
                    continue
                start, stop = max(first, layer.start), min(end, layer.stop)
                if start < stop:
                    outputs = slice(start - layer.start, stop - layer.start)
                    apply(rows[start - first : stop - first], outputs, slice(0, self.in_features))

        return change


@dataclass(frozen=True)
class StackEdit:
    """Updates added to a stack of matrices, of which a tensor holds one, or some of its rows, or all."""

    name: str  # the tensor, for messages
    update: Callable[[], Update]  # reads the update of the stack
    shape: tuple[int, int]  # `[out, in]` of a whole matrix
    # shape of a matrix as it is stored, where a stored row of the tensor is one; None for rows of a matrix
    stored: tuple[int, ...] | None = None
    index: int = 0  # the matrix whose rows those are
    start: int = 0  # the first of them in the matrix
    # gives `[out, in]` of a stored matrix; it may be a view
    as_modelled: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray
    as_stored: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray  # undoes that
    not_finite: str = NOT_FINITE  # text of the error, as of `LayerEdit.prepare`
    takes_rows: bool = field(default=True, init=False)

    def prepare(self) -> RowEdit:
        """Read the update; the result changes stored rows in place."""
        update = self.update()

        def change(rows: NDArray[Any], first: int) -> None:
            if self.stored is None:
                own = update if update.stack is None else update.matrix(self.index)
                self._fold(rows, own, self.start + first)
            else:
                for index, row in enumerate(rows, first):
                    stored = row.reshape(self.stored)
                    matrix = self.as_modelled(stored)
                    self._fold(matrix, update.matrix(index), 0)
                    stored[...] = self.as_stored(matrix)
            check_finite(rows, self.name, self.not_finite)

        return change

    def _fold(self, part: NDArray[Any], update: Update, first: int) -> None:
        """Fold into rows of a matrix, counted from its first."""
        fold_region(part, [update], slice(first, first + part.shape[0]), slice(0, self.shape[1]), self.shape)


def kept_updates(adapter: StoredAdapter) -> Callable[[str], Update]:
    """Reads the updates of an adapter's parameters by their paths, and keeps the last ones for their other parts."""
    return lru_cache(_KEPT)(adapter.update)


@dataclass(frozen=True)
class ValuesEdit:
    """New values of a tensor that is not multiplied by, such as a bias or an embedding, or of a whole one."""

    name: str  # name of the parameter
    values: Callable[[], NDArray[Any]]  # reads the values `[rows, ...]`; those of a vector are one row
    start: int = 0  # first of them in each stored row
    not_finite: str = NOT_FINITE  # text of the error, as of `LayerEdit.prepare`
    takes_rows: bool = field(default=True, init=False)

    def prepare(self) -> RowEdit:
        """Read the values; the result replaces rows."""
        values = self.values()
        values = values.reshape(len(values) if values.ndim > 1 else 1, -1)

        def change(rows: NDArray[Any], first: int) -> None:
            part = rows[:, self.start : self.start + values.shape[1]]
            assign(part, values[first : first + len(rows)])
            check_finite(part, self.name, self.not_finite)

        return change


def constant(values: NDArray[Any]) -> Callable[[], NDArray[Any]]:
    """A reader of values that are at hand."""
    return lambda: values


def assign(part: NDArray[Any], values: NDArray[Any]) -> None:
    """Write values over others, cast to their dtype; those that it does not have become infinite."""
    with np.errstate(over="ignore"):
        part[...] = values


def check_finite(values: NDArray[Any], name: str, text: str = NOT_FINITE) -> None:
    """Check that folded values are finite."""
    if not extremes_are_finite(values):
        raise MergeError(text.format(name=name, dtype=values.dtype.name))
