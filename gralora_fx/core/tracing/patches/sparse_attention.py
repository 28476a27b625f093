"""Sparse attention while a decoder is traced: an indexer scores the keys, and a query attends to the best of them.

A graph computes the products with all keys and hides those that were not chosen, as the models' own code does on a
CPU: what is computed is the same, though not less of it.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

_ENDING = "Indexer"  # of the names of classes that choose keys


def only_chosen(mask: Tensor, chosen: Tensor) -> Tensor:
    """A mask that hides every key that was not chosen for a query.

    Args:
        mask: `[batch, 1, length, total]`, added to scores.
        chosen: `[batch, length, count]`, the places of keys.
    """
    hidden = torch.ones_like(mask, dtype=torch.bool).scatter(-1, chosen.unsqueeze(1).long(), False)
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


@contextmanager
def symbolic_counts(model: nn.Module) -> Iterator[None]:
    """Let indexers choose as many keys as there are, if these are fewer than they want, whatever a graph's sizes.

    Python's `min` of a size compares it, which would fix the comparison in a graph.
    """
    owners = {type(part).__module__ for part in model.modules() if type(part).__name__.endswith(_ENDING)}
    with ExitStack() as changed:
        for owner in sorted(owners):
            changed.enter_context(patch.object(sys.modules[owner], "min", smaller, create=True))
        yield


def smaller(*values: Any, **options: Any) -> Any:
    """Python's `min`, which of two sizes of a graph is an operation and not a comparison."""
    if len(values) == 2 and any(isinstance(value, torch.SymInt) for value in values):
        return torch.sym_min(*values)  # type: ignore[no-untyped-call]
    return builtins.min(*values, **options)
