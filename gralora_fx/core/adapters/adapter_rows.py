"""Rows of one batch that have adapters of their own: which rows each has, their values, a run and its losses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gralora_fx.errors import RewriteError, shown

BASE = "__base__"  # PEFT's name for rows without an adapter
Rows = slice | Tensor  # of a batch: those of a slice, or with these indices


def named(adapter_names: object) -> list[str]:
    """Check the names of rows.

    Args:
        adapter_names: As of a call: a name for each row.

    Raises:
        RewriteError: It is no list of names.
    """
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise RewriteError(
            f"adapter_names has the name of an adapter for each row ({BASE!r} for none), but got {shown(adapter_names)}"
        )
    return list(adapter_names)


def rows_by_adapter(names: Sequence[str], count: int, device: torch.device) -> dict[str, Rows]:
    """Return which rows each adapter has: slices where all are contiguous, else indices.

    Args:
        names: The name of each row.
        count: Number of rows.
        device: Where indices are needed.
    """
    if len(names) != count:
        raise RewriteError(
            f"adapter_names names the adapter of each row: the batch has {count} rows, and {len(names)} names are given"
        )
    places: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        places.setdefault(name, []).append(row)
    places.pop(BASE, None)
    in_order = dict(sorted(places.items()))
    if all(rows[-1] - rows[0] + 1 == len(rows) for rows in in_order.values()):
        return {name: slice(rows[0], rows[-1] + 1) for name, rows in in_order.items()}
    return {name: torch.tensor(rows, device=device) for name, rows in in_order.items()}


def loss_by_adapter(
    outputs: Any,
    labels: Mapping[str, Any],
    adapter_names: Sequence[str],
    loss_of: Callable[[Any, Mapping[str, Any]], Tensor],
) -> dict[str, Tensor]:
    """Compute the loss of each adapter's rows.

    Args:
        outputs: The outputs of the batch, by name.
        labels: Its labels, by name.
        adapter_names: The name of each row's adapter.
        loss_of: Computes the loss of some rows' outputs and labels.
    """
    if not labels:
        raise RewriteError("the losses of adapters need labels, and the batch has none")
    first = next(iter(labels.values()))
    rows = rows_by_adapter(adapter_names, first.shape[0], first.device)
    parts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {name: ({}, {}) for name in rows}
    for place, values in enumerate((outputs, labels)):
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == first.shape[0]:
                for name, part in split_rows(value, rows).items():
                    parts[name][place][key] = part
    return {name: loss_of(type(outputs)(**of_rows), targets) for name, (of_rows, targets) in parts.items()}


def split_rows(value: Tensor, rows: Mapping[str, Rows]) -> dict[str, Tensor]:
    """Return the rows of each adapter, in one operation where they are contiguous.

    Args:
        value: `[batch, ...]`.
        rows: As of `rows_by_adapter`.
    """
    if any(isinstance(chosen, Tensor) for chosen in rows.values()):
        return {name: value[chosen] for name, chosen in rows.items()}
    starts = {name: chosen.start for name, chosen in rows.items()}  # type: ignore[union-attr]
    ends = {0, value.shape[0], *starts.values(), *(chosen.stop for chosen in rows.values())}  # type: ignore[union-attr]
    edges = sorted(ends)
    parts = dict(
        zip(edges, torch.split(value, [end - start for start, end in itertools.pairwise(edges)]), strict=False)
    )
    return {name: parts[start] for name, start in starts.items()}


def rows_of_call(adapter_names: object, values: Tensor, known: Callable[[str], object]) -> dict[str, Rows]:
    """Return which rows each adapter has in a call.

    Args:
        adapter_names: The name of each row's adapter.
        values: The main input.
        known: Raises an error for the name of an adapter that does not exist.

    Raises:
        RewriteError: There is no such adapter, or the batch has another number of rows.
    """
    names = named(adapter_names)
    for name in dict.fromkeys(names):
        if name != BASE:
            known(name)
    return rows_by_adapter(names, values.shape[0], values.device)


def take_rows(x: Tensor, rows: Rows, batch: int | None = None) -> Tensor:
    """Return some rows of a batch: a view for a slice.

    Args:
        x: `[batch, ...]`; or `[batch * n, ...]`, n of a row beside each other.
        rows: Which rows.
        batch: Number of rows, where each has several places in the first axis.
    """
    return x[rows] if batch is None else torch.unflatten(x, 0, (batch, -1))[rows].flatten(0, 1)


def set_rows(
    y: Tensor, rows: Sequence[Rows], values: Sequence[Tensor], batch: int | None = None, *, in_place: bool = True
) -> Tensor:
    """Return a batch in which some rows have other values: written in place where no gradient is recorded.

    Args:
        y: `[batch, ...]`, or `[batch * n, ...]` as for `take_rows`.
        rows: Which rows; no two have one in common.
        values: Their values.
        batch: As for `take_rows`.
        in_place: False never overwrites, for a `y` with other readers.
    """
    if batch is not None:
        parts = [torch.unflatten(value, 0, (-1, y.shape[0] // batch)) for value in values]
        return set_rows(torch.unflatten(y, 0, (batch, -1)), rows, parts, in_place=in_place).flatten(0, 1)
    values = [value.type_as(y) for value in values]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y, *values)):
        return _with_rows(y, rows, values)
    in_place = in_place and not torch.compiler.is_compiling()
    written = y if in_place else y.clone()
    for chosen, value in zip(rows, values, strict=True):
        if not (in_place and isinstance(chosen, slice) and value.data_ptr() == y[chosen].data_ptr()):  # as a view is
            written[chosen] = value
    return written


def _with_rows(y: Tensor, rows: Sequence[Rows], values: Sequence[Tensor]) -> Tensor:
    """Return a batch with other rows in a new tensor, by one operation that autograd differentiates."""
    if isinstance(rows[0], slice):
        parts, end = [], 0
        for chosen, value in sorted(zip(rows, values, strict=True), key=lambda pair: pair[0].start):  # type: ignore[union-attr]
            parts += [*([y[end : chosen.start]] if chosen.start > end else []), value]  # type: ignore[union-attr]
            end = chosen.stop  # type: ignore[union-attr]
        return torch.cat([*parts, y[end:]] if end < y.shape[0] else parts)
    return y.index_copy(0, torch.cat(rows), torch.cat(values))  # type: ignore[arg-type]
