"""Choice of a row's next token, from the distributions of transformers' processors, and log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError
from gralora_fx.run.generate.answer_options import Sampling

if TYPE_CHECKING:
    from gralora_fx.run.generate.constraints import RowConstraint
    from gralora_fx.run.generate.logit_rules import Rule, Scores


@dataclass(frozen=True)
class TokenScore:
    """A token's log-probability in the model's own distribution."""

    token: int  # the token's id
    logprob: float  # its log-probability
    # ids and log-probabilities of the likeliest tokens at its position, likeliest first
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """A chosen token."""

    token: int  # its id
    score: TokenScore | None = None  # its log-probability, if requested
    # tokens that the answer's constraint forces after it; none if scores are requested, since each token then needs its
    # own logits
    forced: tuple[int, ...] = ()
    completes: bool = False  # whether the answer is over after these, as its constraint allows no other token

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens that it adds."""
        return (self.token, *self.forced)


class TokenChooser:
    """Chooses the tokens of one answer; draws depend on its own seed only, not on other rows."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        ends: frozenset[int],
        rules: Sequence[Rule] = (),
        constraint: RowConstraint | None = None,
    ) -> None:
        """Take the rules in the order of transformers' `generate`."""
        self._ids = list(prompt)
        self._top, self._sampling = sampling.logprobs, sampling
        self._rules = [*_penalties(sampling, len(prompt), ends), *rules]
        self._constraint = constraint
        self._needs_mask = sampling.do_sample or bool(self._rules)  # whether to mask all tokens, rather than test one
        self._numbers = np.random.default_rng(sampling.seed) if sampling.do_sample else None

    def __call__(self, logits: NDArray[Any]) -> Choice:
        """Choose the next token, and remember it; `logits` are the model's output for it, `[vocabulary]`."""
        constraint = self._constraint
        if constraint is not None and constraint.forced:
            token = constraint.forced.popleft()
        else:
            token = self._choose(logits)
            if constraint is not None:
                constraint.take(token)
                if self._needs_mask:
                    constraint.foresee()
        self._ids.append(token)
        score = None if self._top is None else token_scores(logits[None], [token], self._top)[0]
        if constraint is None:
            return Choice(token, score)
        forced = tuple(constraint.forced) if score is None else ()
        if forced:
            constraint.forced.clear()
            self._ids += forced
        return Choice(token, score, forced, constraint.is_complete)

    def plausible(self, proposed: list[int]) -> list[int]:
        """Return the longest prefix of proposed tokens that the answer's constraint allows."""
        constraint = self._constraint
        return proposed if constraint is None or constraint.forced else proposed[: constraint.prefix(proposed)]

    def _choose(self, logits: NDArray[Any]) -> int:
        constraint = self._constraint
        if self._numbers is None and not self._rules:
            likeliest = int(logits.argmax())
            if constraint is None:
                return likeliest
            self._needs_mask = not constraint.permits(likeliest)  # assume the same for the next token
            return int(_masked(logits, constraint).argmax()) if self._needs_mask else likeliest
        scores = logits.astype(np.float32)
        for rule in self._rules:
            rule(self._ids, scores)
        if constraint is not None:
            scores[~constraint.allowed(len(scores))] = -np.inf
            if scores.max() == -np.inf:  # the rules leave none
                scores = _masked(logits, constraint).astype(np.float32)
        if self._numbers is None:
            return int(scores.argmax())
        tokens, shares = distribution(scores, self._sampling)
        sums = shares.cumsum(dtype=np.float64)
        if not sums[-1] > 0:
            raise ServingError("the model's logits are not finite, so no token can be drawn")
        drawn = int(sums.searchsorted(self._numbers.random() * sums[-1], "right"))
        return int(tokens[min(drawn, len(tokens) - 1)])


def _masked(logits: NDArray[Any], constraint: RowConstraint) -> NDArray[Any]:
    """Set logits `[vocabulary]` of tokens that a constraint forbids to minus infinity."""
    masked: NDArray[Any] = np.where(constraint.allowed(len(logits)), logits, logits.dtype.type(-np.inf))
    return masked


def distribution(scores: Scores, sampling: Sampling) -> tuple[NDArray[np.int64], Scores]:
    """Return the tokens to draw from, and the probability of each; `scores` are `[vocabulary]`.

    Each step leaves what transformers' processor of the option leaves, and sees the remaining tokens only, often few.
    """
    tokens = np.flatnonzero(scores != -np.inf)
    scores = scores[tokens] / np.float32(sampling.temperature)
    if 0 < sampling.top_k < len(scores):
        least = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        tokens, scores = tokens[scores >= least], scores[scores >= least]
    if sampling.top_p < 1:
        order = scores.argsort()
        sums = _shares(scores[order]).cumsum(dtype=np.float64).astype(np.float32)
        kept = np.sort(order[min(int((sums <= np.float32(1 - sampling.top_p)).sum()), len(order) - 1) :])
        tokens, scores = tokens[kept], scores[kept]
    if sampling.min_p:
        shares = _shares(scores)
        is_kept = shares >= np.float32(sampling.min_p) * shares.max()
        tokens, scores = tokens[is_kept], scores[is_kept]
    return tokens, _shares(scores)


def _shares(scores: Scores) -> Scores:
    """Return the probabilities of scores."""
    with np.errstate(invalid="ignore"):  # of an infinite one
        parts = np.exp(scores - scores.max())
    shares: Scores = parts / parts.sum()
    return shares


def token_scores(logits: NDArray[Any], tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Return scores of tokens and of the `top` likeliest beside each, from their logits `[tokens, vocabulary]`."""
    scores = logits.astype(np.float32)
    scores -= scores.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    own = scores[np.arange(len(tokens)), list(tokens)].tolist()
    count = min(top, scores.shape[1])
    likeliest = np.argpartition(-scores, count - 1)[:, :count] if count else np.zeros((len(tokens), 0), np.int64)
    order = np.argsort(-np.take_along_axis(scores, likeliest, 1), kind="stable")
    likeliest = np.take_along_axis(likeliest, order, 1)
    values = np.take_along_axis(scores, likeliest, 1)
    pairs = [tuple(zip(*row, strict=True)) for row in zip(likeliest.tolist(), values.tolist(), strict=True)]
    return [TokenScore(*fields) for fields in zip(tokens, own, pairs, strict=True)]


def _penalties(sampling: Sampling, length: int, ends: frozenset[int]) -> Iterator[Rule]:
    """Yield the rules that change logits of single tokens, by option or by occurrence."""
    repetition = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    if not (sampling.logit_bias or sampling.min_new_tokens) and repetition == (1, 0, 0):
        return
    from gralora_fx.run.generate.logit_rules import Occurrence, Repetition, SequenceBias, Suppressed

    if sampling.logit_bias:
        yield SequenceBias([([int(token)], float(value)) for token, value in sampling.logit_bias.items()])
    if sampling.repetition_penalty != 1:
        yield Repetition(float(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        yield Occurrence(float(sampling.presence_penalty), float(sampling.frequency_penalty), length)
    if sampling.min_new_tokens and ends:
        yield Suppressed(sorted(ends), below=length + int(sampling.min_new_tokens))
