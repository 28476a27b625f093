"""The answers of `generate`: prompts that run together, each until its own end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from gralora_fx.serving.answer import Answer
from gralora_fx.serving.decoder import Decoder, DecoderRows
from gralora_fx.serving.prompts import Prompts
from gralora_fx.serving.sampling import Sampling
from gralora_fx.serving.token_choice import TokenChooser
from gralora_fx.serving.token_scores import TokenScore


class Scored(NamedTuple):
    """An answer, or a piece of one, with the log-probabilities of its tokens.

    Attributes:
        content: The text, or the token ids.
        scores: The score of each of its tokens.
    """

    content: Any
    scores: list[TokenScore]


class Answers(Iterator[Any]):
    """The answers to prompts, piece by piece, or all at once."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase | None,
        sampling: Sampling,
        stop: Sequence[str],
        adapter: str | Sequence[str | None] | None = None,
    ) -> None:
        """Check the prompts, and let the decoder read them.

        Args:
            decoder: The decoder.
            prompts: The prompts to answer.
            tokenizer: For texts, and for stop strings.
            sampling: How tokens are chosen.
            stop: Strings that end an answer.
            adapter: The adapter to answer with, or of each; None for the base.

        Raises:
            ServingError: The decoder does not take a prompt, an option or the adapter, or it fails.
        """
        limits = decoder.limits
        self._left = limits.new_tokens(prompts.rows, sampling)
        self._rows: DecoderRows | None = decoder.rows(prompts.rows, self._left, adapter)
        self._prompts = prompts
        self._gives_scores = sampling.logprobs is not None
        reader = tokenizer if prompts.gives_text or stop else None
        ends = limits.ends if sampling.ends is None else sampling.ends
        self._answers = [Answer(reader, ends, stop) for _ in prompts.rows]
        self._scores: list[list[TokenScore]] = [[] for _ in prompts.rows]
        self._choosers: Mapping[int, TokenChooser] = {
            index: TokenChooser(seeded(sampling, index), row, ends) for index, row in enumerate(prompts.rows)
        }

    def __next__(self) -> Any:
        """What the next step adds: a text or ids, or a list of them for a list of prompts."""
        if self._rows is None or not self._left or all(answer.has_ended for answer in self._answers):
            self._rows = None  # with what they hold, the cache and the adapter
            raise StopIteration
        self._left -= 1
        choices = self._rows.step({row: c for row, c in self._choosers.items() if not self._answers[row].has_ended})
        pieces: list[Any] = []
        for row, answer in enumerate(self._answers):
            before, text = len(answer.ids), ""
            if row in choices:
                text = answer.take(choices[row].token)
            if not self._left:
                text += answer.finish()
            new = answer.ids[before:]
            scores = [choices[row].score for _ in new]
            self._scores[row] += scores  # type: ignore[arg-type]
            piece: Any = text if self._prompts.gives_text else new
            pieces.append(Scored(piece, scores) if self._gives_scores else piece)  # type: ignore[arg-type]
        return pieces[0] if self._prompts.is_single else pieces

    def result(self) -> Any:
        """The whole answers."""
        for _ in self:
            pass
        answers: list[Any] = [answer.text if self._prompts.gives_text else answer.ids for answer in self._answers]
        if self._gives_scores:
            answers = [Scored(*pair) for pair in zip(answers, self._scores, strict=True)]
        return answers[0] if self._prompts.is_single else answers


def seeded(sampling: Sampling, index: int) -> Sampling:
    """The options for one of several answers, which draws by a seed of its own."""
    return sampling if sampling.seed is None else dataclasses.replace(sampling, seed=(sampling.seed + index) % 2**31)
