"""Rows of one batch that have adapters of their own: which rows each has, their values, a run and its losses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gralora_fx.core.methods.low_rank import Rows
from gralora_fx.errors import RewriteError, shown

BASE = "__base__"  # PEFT's name for rows without an adapter


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
    adapter_names: object,
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
    rows = rows_by_adapter(named(adapter_names), first.shape[0], first.device)
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
