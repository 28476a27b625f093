"""Draws by probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

_TOGETHER = 64  # rows whose sums are in memory at once


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a column of every row by its probability; one without any is never drawn.

    A row takes one random number. `torch.multinomial` takes one for each column, which costs more than the softmax.

    Args:
        probabilities: `[rows, columns]`; rows need not add up to one.
        generator: Draws the numbers.

    Returns:
        The columns, `[rows]`.

    Raises:
        RuntimeError: A row is not finite.
    """
    numbers = 1 - torch.rand(len(probabilities), 1, dtype=torch.double, generator=generator)
    drawn = []
    for part, number in zip(torch.split(probabilities, _TOGETHER), torch.split(numbers, _TOGETHER), strict=True):
        sums = part.cumsum(-1, dtype=torch.double)
        totals = sums[:, -1:]
        if not bool(totals.isfinite().all()):
            raise RuntimeError("its probabilities are not finite")
        drawn.append(torch.searchsorted(sums, number * totals)[:, 0])  # no number is 0, which a first sum may be
    return torch.cat(drawn)
