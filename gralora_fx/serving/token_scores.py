"""Log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenScore:
    """A token's log-probability where it stands, by the model's own distribution.

    Attributes:
        token: The token's id.
        logprob: Its log-probability.
        top: Ids and log-probabilities of the likeliest tokens there, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_scores(logits: NDArray[Any], tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Scores of tokens.

    Args:
        logits: `[tokens, vocabulary]`, what the model gives for each place.
        tokens: The tokens at these places.
        top: How many of the likeliest tokens to score beside each.
    """
    scores = torch.from_numpy(logits).float().log_softmax(-1)
    own = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    values, ids = scores.topk(min(top, scores.shape[1]))
    pairs = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenScore(*fields) for fields in zip(tokens, own, pairs, strict=True)]
