"""The next token of a row, chosen from its logits by transformers' processors, and log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

from gralora_fx.serving.sampling import Sampling


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


@dataclass(frozen=True)
class Choice:
    """A token that was chosen.

    Attributes:
        token: Its id.
        score: Its log-probability, if that is asked for.
    """

    token: int
    score: TokenScore | None = None


class TokenChooser:
    """Chooses the tokens of one answer; its draws depend on its own seed alone, not on other rows."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], ends: frozenset[int], rules: Sequence[Any] = ()
    ) -> None:
        """Prepare the processors, in the order of transformers' `generate`.

        Args:
            sampling: How tokens are chosen.
            prompt: The tokens before the answer.
            ends: Ids of the tokens that end the answer.
            rules: The processors of the model itself, which come after those of the options.
        """
        self._ids = list(prompt)
        self._top = sampling.logprobs
        self._processors = LogitsProcessorList([*_penalties(sampling, len(prompt), ends), *rules])
        self._reads_ids = bool(self._processors)
        self._generator: torch.Generator | None = None
        if sampling.do_sample:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(int(sampling.seed))
            self._processors.extend(_warpers(sampling))

    def __call__(self, logits: NDArray[Any]) -> Choice:
        """Choose the next token, and remember it.

        Args:
            logits: `[vocabulary]`, what the model gives after the prompt and the tokens that were chosen before.
        """
        token = self._choose(logits)
        self._ids.append(token)
        if self._top is None:
            return Choice(token)
        return Choice(token, token_scores(logits[None], [token], self._top)[0])

    def _choose(self, logits: NDArray[Any]) -> int:
        if not self._processors and self._generator is None:
            return int(logits.argmax())
        ids = torch.tensor([self._ids if self._reads_ids else self._ids[-1:]])
        scores = self._processors(ids, torch.from_numpy(logits).float()[None])
        if self._generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


class OccurrencePenalty:
    """OpenAI's penalties: what a token of the answer loses because it occurs there, and for each time that it does."""

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        """Set the penalties.

        Args:
            presence: What a token loses once.
            frequency: What it loses each time.
            prompt_length: How many of the ids are the prompt's.
        """
        self._presence, self._frequency, self._start = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores `[rows, vocabulary]` after the penalties.

        Args:
            input_ids: `[rows, length]`, the prompts and answers.
            scores: `[rows, vocabulary]`.
        """
        new = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones(new.shape, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


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


def _penalties(sampling: Sampling, length: int, ends: frozenset[int]) -> list[Any]:
    """What changes the logits of single tokens, by what was chosen before."""
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
    """What shapes the distribution that is drawn from."""
    processors: list[Any] = []
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(int(sampling.top_k)))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(float(sampling.min_p)))
    return processors
