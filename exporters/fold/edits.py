"""Edits of stored weights, some rows at a time: updates folded in, or values replaced."""

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
    """The edit of a layer's weight `[out, in]` within a matrix: an update is added, or values are replaced."""

    name: str  # the layer, for messages
    start: int  # first of its output features in the matrix
    stop: int  # end of them
    update: Callable[[], Update] | None = None  # reads the update; None to take the values
    values: NDArray[Any] | None = None  # the values `[out, in]`
    takes_parts: bool = True  # whether parts of the weight can be changed one at a time

    @classmethod
    def folding(cls, adapter: StoredAdapter, path: str, name: str, start: int, stop: int) -> Self:
        """Return the edit that adds an adapter's update to a layer's weight."""
        return cls(name, start, stop, partial(adapter.update, path), takes_parts=adapter.method.has_lora_form)

    def prepare(self, in_features: int, not_finite: str = NOT_FINITE) -> Callable[[NDArray[Any], slice, slice], None]:
        """Read the update; return `change(part, rows, columns)`, which edits a part of the weight in place.

        The part is `weight[rows, columns]`, or a view of it; rows count from the layer's first output.
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
    """The edit of a float matrix that holds the weights of one or several layers."""

    layers: tuple[LayerEdit, ...]  # the edit of each
    in_features: int  # input features of the matrix
    transposed: bool  # whether it is stored `[in, out]`
    not_finite: str = NOT_FINITE  # text of the error, as in `LayerEdit.prepare`

    @property
    def takes_rows(self) -> bool:
        """True if some stored rows can be changed at a time, rather than all at once."""
        return all(layer.takes_parts for layer in self.layers)

    def prepare(self) -> RowEdit:
        """Read the updates; return a function that changes rows of the matrix as it is stored."""
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
    """The edit that adds an update to a stack of matrices; a tensor holds one, some rows of one, or all."""

    name: str  # the tensor, for messages
    update: Callable[[], Update]  # reads the update of the stack
    shape: tuple[int, int]  # `[out, in]` of a whole matrix
    # shape of a stored matrix if each row of the tensor is a whole matrix; None if it is a row of one
    stored: tuple[int, ...] | None = None
    index: int = 0  # index of the matrix to which the tensor's rows belong
    start: int = 0  # the first of these rows in the matrix
    # converts a stored matrix to `[out, in]`; the result may be a view
    as_modelled: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray
    as_stored: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray  # the inverse of `as_modelled`
    not_finite: str = NOT_FINITE  # text of the error, as in `LayerEdit.prepare`
    takes_rows: bool = field(default=True, init=False)

    def prepare(self) -> RowEdit:
        """Read the update; return a function that changes stored rows in place."""
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
    """Return a reader of an adapter's updates by path, which caches the last ones for their other parts."""
    return lru_cache(_KEPT)(adapter.update)


@dataclass(frozen=True)
class ValuesEdit:
    """New values of a tensor that no product multiplies by, such as a bias or an embedding, or of a whole tensor."""

    name: str  # name of the parameter
    values: Callable[[], NDArray[Any]]  # reads the values `[rows, ...]`; a vector is one row
    start: int = 0  # first of them in each stored row
    not_finite: str = NOT_FINITE  # text of the error, as in `LayerEdit.prepare`
    takes_rows: bool = field(default=True, init=False)

    def prepare(self) -> RowEdit:
        """Read the values; return a function that replaces rows."""
        values = self.values()
        values = values.reshape(len(values) if values.ndim > 1 else 1, -1)

        def change(rows: NDArray[Any], first: int) -> None:
            part = rows[:, self.start : self.start + values.shape[1]]
            assign(part, values[first : first + len(rows)])
            check_finite(part, self.name, self.not_finite)

        return change


def constant(values: NDArray[Any]) -> Callable[[], NDArray[Any]]:
    """Return a reader of values in memory."""
    return lambda: values


def assign(part: NDArray[Any], values: NDArray[Any]) -> None:
    """Write values over others, cast to their dtype; values that the dtype cannot hold become infinite."""
    with np.errstate(over="ignore"):
        part[...] = values


def check_finite(values: NDArray[Any], name: str, text: str = NOT_FINITE) -> None:
    """Check that folded values are finite."""
    if not extremes_are_finite(values):
        raise MergeError(text.format(name=name, dtype=values.dtype.name))
