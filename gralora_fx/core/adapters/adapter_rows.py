"""A different adapter for each row of a batch: its rows and its loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gralora_fx.core.adapters.adapter import ModelAdapter
from gralora_fx.core.config.checks import BASE, check_row_names
from gralora_fx.core.methods.low_rank import Rows
from gralora_fx.errors import RewriteError


def rows_by_adapter(names: Sequence[str], device: torch.device) -> dict[str, Rows]:
    """Return each adapter's rows, given each row's adapter: slices if all are contiguous, else index tensors."""
    places: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        places.setdefault(name, []).append(row)
    places.pop(BASE, None)
    in_order = dict(sorted(places.items()))
    if all(rows[-1] - rows[0] + 1 == len(rows) for rows in in_order.values()):
        return {name: slice(rows[0], rows[-1] + 1) for name, rows in in_order.items()}
    return {name: torch.tensor(rows, device=device) for name, rows in in_order.items()}


def check_trained(adapter_names: object, known: Callable[[str], ModelAdapter]) -> None:
    """Check that every adapter of a batch exists and is trainable, so that its loss is of use."""
    for name in dict.fromkeys(check_row_names(adapter_names)):
        if name != BASE and not any(parameter.requires_grad for parameter in known(name).parameters()):
            raise RewriteError(
                f"adapter {name!r} does not train, and losses_by_adapter would train nothing with its rows; call "
                f"set_requires_grad([{name!r}]) first, or leave its rows out"
            )


def loss_of_rows(
    outputs: Any, labels: Mapping[str, Any], adapter_names: object, loss_of: Callable[[Any, Mapping[str, Any]], Tensor]
) -> dict[str, Tensor]:
    """Compute each adapter's loss over its own rows of a batch's outputs and labels."""
    if not labels:
        raise RewriteError("the losses of adapters need labels, and the batch has none")
    first = next(iter(labels.values()))
    rows = rows_by_adapter(check_row_names(adapter_names, first.shape[0]), first.device)
    parts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {name: ({}, {}) for name in rows}
    for place, values in enumerate((outputs, labels)):
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == first.shape[0]:
                for name, part in split_rows(value, rows).items():
                    parts[name][place][key] = part
    return {name: loss_of(type(outputs)(**of_rows), targets) for name, (of_rows, targets) in parts.items()}


def split_rows(value: Tensor, rows: Mapping[str, Rows]) -> dict[str, Tensor]:
    """Return the rows of each adapter in `[batch, ...]`, with one `torch.split` if they are contiguous."""
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
    """Return each adapter's rows in a call; raise if an adapter does not exist or the batch has another size."""
    names = check_row_names(adapter_names, values.shape[0])
    for name in dict.fromkeys(names):
        if name != BASE:
            known(name)
    return rows_by_adapter(names, values.device)
