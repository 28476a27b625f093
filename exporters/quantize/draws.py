"""Draws by the probabilities of logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def draw(logits: Tensor, generator: torch.Generator, left_out: Sequence[int] = ()) -> Tensor:
    """Draw a column of every row by its probability; one of `-inf` is never drawn.

    A row takes one random number, by which its cumulative sums are searched; `torch.multinomial` takes one for each
    column, which costs more than the softmax. Rows are worked on one at a time, as long as they are in the cache, and
    by numpy: threads would wait longer for each other than a row takes.

    Args:
        logits: `[rows, columns]`, float32.
        generator: Draws the numbers.
        left_out: Columns that are not drawn.

    Returns:
        The columns, `[rows]`.
    """
    if left_out:
        logits = logits.clone()
        logits[:, list(left_out)] = float("-inf")
    numbers = 1 - torch.rand(len(logits), dtype=torch.double, generator=generator)
    drawn = []
    with np.errstate(invalid="ignore"):
        for row, number in zip(logits.numpy(), numbers.tolist(), strict=True):
            sums = np.exp(row - row.max()).cumsum(dtype=np.float64)
            if not np.isfinite(sums[-1]):
                raise RuntimeError("its probabilities are not finite")
            drawn.append(int(sums.searchsorted(number * sums[-1])))  # no number is 0, which a first sum may be
    return torch.tensor(drawn, dtype=torch.long)
