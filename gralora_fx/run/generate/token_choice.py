"""Choice of a row's next token by transformers' logits processors, and log-probabilities of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gralora_fx.run.generate.answer_options import Sampling

if TYPE_CHECKING:
    from gralora_fx.run.generate.constraints import RowConstraint


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
        rules: Sequence[Any] = (),
        constraint: RowConstraint | None = None,
    ) -> None:
        """Build the processors, in the order of transformers' `generate`."""
        self._ids = list(prompt)
        self._top = sampling.logprobs
        self._rules = LogitsProcessorList([*_penalties(sampling, len(prompt), ends), *rules])
        self._warpers = LogitsProcessorList()
        self._constraint = constraint
        self._needs_mask = sampling.do_sample or bool(self._rules)  # whether to mask all tokens, rather than test one
        self._generator: torch.Generator | None = None
        if sampling.do_sample:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(int(sampling.seed))
            self._warpers.extend(_warpers(sampling))

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
        if self._generator is None and not self._rules:
            likeliest = int(logits.argmax())
            if self._constraint is None:
                return likeliest
            self._needs_mask = not self._constraint.permits(likeliest)  # assume the same for the next token
            return int(_masked(logits, self._constraint).argmax()) if self._needs_mask else likeliest
        ids = torch.tensor([self._ids if self._rules else self._ids[-1:]])
        if self._constraint is not None and not self._rules:
            logits = _masked(logits, self._constraint)
        scores = self._rules(ids, torch.from_numpy(logits).float()[None])
        if self._constraint is not None and self._rules:
            scores = self._within(self._constraint, scores, logits)
        if self._generator is None:
            return int(scores.argmax())
        scores = self._warpers(ids, scores) if self._constraint is None else self._warped_apart(ids, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def _warped_apart(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Warp the scores of allowed tokens only, often few, since warping sorts them."""
        allowed = (scores[0] > -math.inf).nonzero()[:, 0]
        warped = self._warpers(ids, scores[:, allowed])
        return torch.full_like(scores, -math.inf).index_copy_(1, allowed, warped)

    def _within(self, constraint: RowConstraint, scores: torch.Tensor, logits: NDArray[Any]) -> torch.Tensor:
        """Return the scores of tokens that a constraint allows; their unprocessed logits if the rules leave none."""
        scores = scores.masked_fill(torch.from_numpy(~constraint.allowed(scores.shape[1])), -math.inf)
        return torch.from_numpy(_masked(logits, constraint)).float()[None] if scores.max() == -math.inf else scores


def _masked(logits: NDArray[Any], constraint: RowConstraint) -> NDArray[Any]:
    """Set logits `[vocabulary]` of tokens that a constraint forbids to minus infinity."""
    masked: NDArray[Any] = np.where(constraint.allowed(len(logits)), logits, logits.dtype.type(-np.inf))
    return masked


class OccurrencePenalty:
    """OpenAI's penalties for tokens that occur in the answer: once (presence), and per occurrence (frequency)."""

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        """Set the penalties."""
        self._presence, self._frequency, self._start = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores `[rows, vocabulary]` after the penalties; `input_ids` are prompts and answers."""
        new = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones(new.shape, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class _SortedTopP:
    """transformers' `top_p` warper on presorted scores, in half of the time.

    numpy sorts them with vector instructions, and torch then finds them sorted. Which of equal scores is dropped at the
    threshold is undefined there, too.
    """

    def __init__(self, top_p: float) -> None:
        self._warp = TopPLogitsWarper(top_p)

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores `[1, vocabulary]`, minus infinity for those dropped."""
        row = scores[0].numpy()
        if np.isneginf(row).sum() > len(row) // 2:  # top_k drops most, and equal scores sort quickly
            warped: torch.Tensor = self._warp(input_ids, scores)
            return warped
        order = torch.from_numpy(np.argsort(row))
        warped = torch.empty_like(scores)
        warped[0, order] = self._warp(input_ids, scores[:, order])[0]
        return warped


def token_scores(logits: NDArray[Any], tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Return scores of tokens and of the `top` likeliest beside each, from their logits `[tokens, vocabulary]`."""
    scores = torch.from_numpy(logits).float().log_softmax(-1)
    own = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    values, ids = scores.topk(min(top, scores.shape[1]))
    pairs = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenScore(*fields) for fields in zip(tokens, own, pairs, strict=True)]


def _penalties(sampling: Sampling, length: int, ends: frozenset[int]) -> list[Any]:
    """Return the processors that change logits of single tokens, by option or by occurrence."""
    processors: list[Any] = []
    if sampling.logit_bias:
        bias = {(int(token),): float(value) for token, value in sampling.logit_bias.items()}
        processors.append(SequenceBiasLogitsProcessor(bias))
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.presence_penalty or sampling.frequency_penalty:
        penalties = float(sampling.presence_penalty), float(sampling.frequency_penalty)
        processors.append(OccurrencePenalty(*penalties, length))
    if sampling.min_new_tokens and ends:
        processors.append(MinNewTokensLengthLogitsProcessor(length, int(sampling.min_new_tokens), sorted(ends)))
    return processors


def _warpers(sampling: Sampling) -> list[Any]:
    """Return the processors that shape the distribution to draw from."""
    processors: list[Any] = []
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(int(sampling.top_k)))
    if sampling.top_p < 1:
        processors.append(_SortedTopP(float(sampling.top_p)))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(float(sampling.min_p)))
    return processors
