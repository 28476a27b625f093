"""The answers of `generate`: prompts that run together, each until its own end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gralora_fx.engine.decoder import Decoder
from gralora_fx.engine.limits import DecoderLimits
from gralora_fx.errors import ServingError, first_line
from gralora_fx.runtime.adapter_stack import names_of_rows
from gralora_fx.serving.answer import Answer
from gralora_fx.serving.prompts import Prompts
from gralora_fx.serving.sampling import Sampling
from gralora_fx.serving.token_choice import TokenChooser
from gralora_fx.serving.token_scores import TokenScore

_CHUNK, _CHUNK_OF_MANY = 256, 64  # tokens of each prompt in a step


class Scored(NamedTuple):
    """An answer, or a piece of one, with the log-probabilities of its tokens.

    Attributes:
        content: The text, or the token ids.
        scores: The score of each of its tokens.
    """

    content: Any
    scores: list[TokenScore]


class OpenDecoder(Protocol):
    """Makes a decoder with as much room as some prompts need."""

    def __call__(self, *, rows: int, capacity: int | None, chunk: int) -> Decoder:
        """See `Decoder`."""


class Answers(Iterator[Any]):
    """The answers to prompts, piece by piece, or all at once."""

    def __init__(
        self,
        open_decoder: OpenDecoder,
        limits: DecoderLimits,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase | None,
        sampling: Sampling,
        stop: Sequence[str],
        adapter: str | Sequence[str | None] | None = None,
    ) -> None:
        """Check the prompts, and let a decoder read them.

        Args:
            open_decoder: Makes the decoder.
            limits: What it can take.
            prompts: The prompts to answer.
            tokenizer: For texts, and for stop strings.
            sampling: How tokens are chosen.
            stop: Strings that end an answer.
            adapter: The adapter to answer with, or of each; None for the base.

        Raises:
            ServingError: The decoder does not take a prompt, an option or the adapter, or it fails.
        """
        self._most, self._steps = sampling.new_tokens(prompts.rows, limits, prompts.new_tokens), 0
        self._prompts = prompts
        self._gives_scores = sampling.logprobs is not None
        reader = tokenizer if prompts.gives_text or stop else None
        ends = limits.ends if sampling.ends is None else sampling.ends
        self._answers = [Answer(reader, ends, stop) for _ in prompts.rows]
        self._scores: list[list[TokenScore]] = [[] for _ in prompts.rows]
        self._choosers: Mapping[int, TokenChooser] = {
            index: TokenChooser(seeded(sampling, index), row, ends, prompts.rules(index, sampling, self._most[index]))
            for index, row in enumerate(prompts.rows)
        }
        self._rows: _Rows | None = _Rows(open_decoder, prompts, self._most, adapter)

    def __next__(self) -> Any:
        """What the next step adds: a text or ids, or a list of them for a list of prompts."""
        going = [row for row, most in enumerate(self._most) if self._steps < most and not self._answers[row].has_ended]
        if self._rows is None or not going:
            self._rows = None  # with what they hold, the cache and the adapter
            raise StopIteration
        self._steps += 1
        try:
            logits = self._rows.step(going)
            choices = {row: self._choosers[row](logits[row]) for row in going}
        except Exception as error:
            self._rows = None  # what was read, and nothing chosen after it, cannot be taken back
            if isinstance(error, ServingError):
                raise
            raise ServingError(f"no token can be chosen ({first_line(error)})") from error
        self._rows.next_tokens = {row: choice.token for row, choice in choices.items()}
        pieces: list[Any] = []
        for row, answer in enumerate(self._answers):
            before, text = len(answer.ids), ""
            if row in choices:
                text = answer.take(choices[row].token)
            if self._steps == self._most[row]:
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


class _Rows:
    """Prompts in the rows of a decoder of their own, and the tokens that were chosen and not read yet."""

    def __init__(
        self,
        open_decoder: OpenDecoder,
        prompts: Prompts,
        new_tokens: Sequence[int],
        adapter: str | Sequence[str | None] | None,
    ) -> None:
        tokens = prompts.rows
        count, longest = len(tokens), max(map(len, tokens))
        names = names_of_rows(adapter, count)
        capacity = max(len(prompt) + new for prompt, new in zip(tokens, new_tokens, strict=True))
        chunk = min(longest, _CHUNK if count == 1 else _CHUNK_OF_MANY)
        self._decoder = open_decoder(rows=count, capacity=capacity, chunk=chunk)
        self._rows = [self._decoder.open(name, prompts.arrays(row)) for row, name in enumerate(names)]
        self._logits: dict[int, NDArray[Any]] = {}
        self.next_tokens: dict[int, int] = {}
        for start in range(0, longest, chunk):
            parts = {row: prompt[start : start + chunk] for row, prompt in enumerate(tokens)}
            self._read({row: part for row, part in parts.items() if part})

    def step(self, going: Sequence[int]) -> dict[int, NDArray[Any]]:
        """The logits `[vocabulary]` after the last token of each row that goes on."""
        self._read({row: [token] for row, token in self.next_tokens.items() if row in going})
        return self._logits

    def _read(self, tokens: Mapping[int, Sequence[int]]) -> None:
        found = self._decoder.step({self._rows[row]: given for row, given in tokens.items()})
        for row in tokens:
            logits = found[self._rows[row]]
            self._logits[row] = logits[-1].copy() if self._decoder.gives_all else logits
