"""Rules that change logits before a token is chosen, each with the result of transformers' processor of its kind.

A rule is called with the ids of a prompt and of its answer so far, and with scores `[vocabulary]`, which it overwrites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Scores: TypeAlias = NDArray[np.float32]
Rule: TypeAlias = Callable[[Sequence[int], Scores], None]


@dataclass(frozen=True)
class SequenceBias:
    """Adds a bias to the last token of a sequence after the others of it."""

    biases: Sequence[tuple[Sequence[int], float]]  # sequences of tokens, each with its bias

    @classmethod
    def of(cls, pairs: Any) -> SequenceBias:
        """Check the pairs of a configuration: lists of tokens, each with a number."""
        if not pairs:
            raise ValueError("sequence_bias is empty")
        return cls([(_tokens(tokens), float(bias)) for tokens, bias in pairs])

    @classmethod
    def against(cls, words: Any, ends: Sequence[int]) -> SequenceBias:
        """Forbid sequences of tokens, but no single token that ends an answer."""
        sequences = [_tokens(word) for word in words]
        if not sequences:
            raise ValueError("bad_words_ids is empty")
        return cls([(each, -np.inf) for each in sequences if not (len(each) == 1 and each[0] in ends)])

    def __call__(self, ids: Sequence[int], scores: Scores) -> None:
        """Add the biases."""
        added = np.zeros_like(scores)
        for sequence, bias in self.biases:
            *before, last = sequence
            if len(sequence) <= max(len(ids), 1) and list(ids[len(ids) - len(before) :]) == before:
                added[last] += bias
        scores += added


@dataclass(frozen=True)
class Repetition:
    """Divides positive logits of tokens that occur by a penalty, and multiplies negative ones by it."""

    penalty: float
    source: Sequence[int] | None = None  # the tokens; None for those of the prompt and the answer

    def __post_init__(self) -> None:
        """Check the penalty."""
        if not self.penalty > 0:
            raise ValueError(f"the penalty of repetition is {self.penalty}, not above 0")

    def __call__(self, ids: Sequence[int], scores: Scores) -> None:
        """Apply the penalty."""
        known = np.unique(np.asarray(ids if self.source is None else self.source, np.int64))
        own = scores[known]
        scores[known] = np.where(own < 0, own * self.penalty, own / self.penalty)


@dataclass(frozen=True)
class Occurrence:
    """OpenAI's penalties for tokens that occur in the answer: once (presence), and per occurrence (frequency)."""

    presence: float
    frequency: float
    start: int  # tokens of the prompt

    def __call__(self, ids: Sequence[int], scores: Scores) -> None:
        """Subtract the penalties."""
        tokens, counts = np.unique(np.asarray(ids[self.start :], np.int64), return_counts=True)
        scores[tokens] = scores[tokens] - self.frequency * counts.astype(np.float32) - self.presence


@dataclass(frozen=True)
class NoRepeats:
    """Forbids a token that would repeat an earlier sequence of tokens."""

    size: int  # tokens of a sequence
    source: Sequence[int] | None = None  # where the sequences are; None for the prompt and the answer

    def __post_init__(self) -> None:
        """Check the size."""
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"the size of sequences that are not repeated is {self.size!r:.80}, not a count")

    def __call__(self, ids: Sequence[int], scores: Scores) -> None:
        """Forbid the tokens."""
        text, ids = list(ids if self.source is None else self.source), list(ids)
        before = ids[len(ids) - self.size + 1 :]
        if len(before) != self.size - 1:
            return
        starts = range(len(text) - self.size + 1)
        scores[[text[at + self.size - 1] for at in starts if text[at : at + self.size - 1] == before]] = -np.inf


@dataclass(frozen=True)
class Suppressed:
    """Forbids tokens: always, at one length of prompt and answer, or below one."""

    tokens: Sequence[int]
    at: int | None = None  # the only length at which it acts
    below: int | None = None  # it acts at shorter lengths

    def __call__(self, ids: Sequence[int], scores: Scores) -> None:
        """Forbid the tokens."""
        if (self.at is None or len(ids) == self.at) and (self.below is None or len(ids) < self.below):
            scores[list(self.tokens)] = -np.inf


@dataclass(frozen=True)
class Forced:
    """Allows certain tokens alone at one length of prompt and answer."""

    tokens: Sequence[int]
    at: int

    def __call__(self, ids: Sequence[int], scores: Scores) -> None:
        """Forbid all others."""
        if len(ids) == self.at:
            scores[:] = -np.inf
            scores[list(self.tokens)] = 0


@dataclass(frozen=True)
class Longing:
    """Raises the logits of end tokens exponentially from a length of prompt and answer on."""

    start: int
    factor: float
    ends: Sequence[int]

    def __call__(self, ids: Sequence[int], scores: Scores) -> None:
        """Raise them."""
        if len(ids) > self.start:
            own = scores[list(self.ends)]
            more = np.abs(own) * (self.factor ** (len(ids) - self.start) - 1)
            scores[list(self.ends)] = np.add(own, more, out=own, where=own > -np.inf)


def finite(ids: Sequence[int], scores: Scores) -> None:
    """Replace logits that are not finite: not-a-number by 0, infinite ones by the largest and the smallest number."""
    np.nan_to_num(scores, copy=False)


def token_ids(given: Any) -> list[int]:
    """Check the id of a token, or a list of them, in a configuration."""
    return _tokens(given if isinstance(given, (list, tuple)) else [given])


def _tokens(given: Iterable[Any]) -> list[int]:
    tokens = list(given)
    if wrong := [token for token in tokens if type(token) is not int or token < 0]:
        raise ValueError(f"{wrong[0]!r:.80} is not the id of a token")
    if not tokens:
        raise ValueError("a list of tokens is empty")
    return tokens
