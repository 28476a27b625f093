"""Arguments of `generate` for each row; in its steps, a row may have become several, as with beams or samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gralora_fx.core.tracing.inputs.input_trees import batch_of
from gralora_fx.format.input_names import ADAPTER_NAMES, STARTS


class RowNames(list[str]):
    """The adapter of each row that `generate` was called with."""


class RowStarts(dict[str, Tensor]):
    """The column from which adapters act, in each row that `generate` was called with."""


def spread_over_copies(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Repeat row arguments for the copies of each row in a step, in place."""
    names, starts = kwargs.get(ADAPTER_NAMES), kwargs.pop(STARTS, None)
    rows = batch_of((*args, *kwargs.values())) if isinstance(names, RowNames) or isinstance(starts, RowStarts) else 0
    if isinstance(names, RowNames):
        kwargs[ADAPTER_NAMES] = [name for name in names for _ in range(rows // len(names))]
    if isinstance(starts, RowStarts):
        starts = {name: each.repeat_interleave(rows // len(each)) for name, each in starts.items()}
    if starts is not None:
        kwargs[STARTS] = starts
