"""What happens to the values of an initializer: updates folded in, or values replaced, some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import MergeError
from gralora_fx.exporters.folding.products import ProductWeight
from gralora_fx.methods.arrays import accumulator_of
from gralora_fx.methods.fold import fold_region
from gralora_fx.methods.method import Update


@dataclass(frozen=True)
class LayerEdit:
    """What happens to one layer's weight `[out, in]`.

    Attributes:
        path: The layer.
        start: First of its output features in the initializer.
        stop: End of them.
        updates: Updates to add.
        values: Values to take instead of those that are there, before the updates; None to keep them.
    """

    path: str
    start: int
    stop: int
    updates: tuple[Update, ...] = ()
    values: NDArray[Any] | None = None

    def apply(self, part: NDArray[Any], rows: slice, columns: slice, in_features: int) -> None:
        """Change a part of the weight in place.

        Args:
            part: `[rows, columns]` of the weight; it may be a view.
            rows: The part's output features, counted from the layer's first.
            columns: Its input features.
            in_features: Input features of the whole weight.

        Raises:
            MergeError: A result is not finite.
        """
        if self.values is not None:
            assign(part, self.values[rows, columns])
        if self.updates:
            fold_region(part, self.updates, rows, columns, (self.stop - self.start, in_features))
        check_finite(part, self.path)


@dataclass(frozen=True)
class MatrixEdit:
    """What happens to a matrix of floats that holds the weights of one or several layers.

    Attributes:
        weight: The initializer.
        layers: What happens to each of them.
    """

    weight: ProductWeight
    layers: tuple[LayerEdit, ...]

    def __call__(self, rows: NDArray[Any], first: int) -> None:
        """Change some of the stored rows in place.

        Args:
            rows: `[n, columns]` as stored.
            first: Number of the first one.
        """
        inputs, end = self.weight.in_features, first + len(rows)
        for layer in self.layers:
            if self.weight.transposed:
                part = rows[:, layer.start : layer.stop].T
                layer.apply(part, slice(0, layer.stop - layer.start), slice(first, end), inputs)
                continue
            start, stop = max(first, layer.start), min(end, layer.stop)
            if start < stop:
                within = slice(start - layer.start, stop - layer.start)
                layer.apply(rows[start - first : stop - first], within, slice(0, inputs), inputs)


@dataclass(frozen=True)
class ValuesEdit:
    """New values of an initializer that is not multiplied by, such as a bias or an embedding.

    Attributes:
        name: Name of the parameter.
        start: First of its values in each stored row.
        values: `[rows, n]`.
    """

    name: str
    start: int
    values: NDArray[Any]

    def __call__(self, rows: NDArray[Any], first: int) -> None:
        """Replace some of the stored rows in place."""
        part = rows[:, self.start : self.start + self.values.shape[1]]
        assign(part, self.values[first : first + len(rows)])
        check_finite(part, self.name)


def assign(part: NDArray[Any], values: NDArray[Any]) -> None:
    """Write values over others, cast to their dtype; those that it does not have become infinite."""
    with np.errstate(over="ignore"):
        part[...] = values


def check_finite(values: NDArray[Any], name: str) -> None:
    """Check that folded values are finite.

    Raises:
        MergeError: One is not: the adapter is damaged, or the dtype has no such number.
    """
    wide = values.astype(accumulator_of(values), copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        is_finite = bool(np.isfinite(wide.sum()) or np.isfinite(wide).all())
    if not is_finite:
        raise MergeError(
            f"the folded weight of {name} is not finite in {values.dtype.name}; the adapter is damaged or too large "
            "for this precision, and nothing was written"
        )
