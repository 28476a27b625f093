"""The completions of prompts, token by token: those of `generate` run together, each until its own end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gralora_fx.engine.adapters import names_of_rows
from gralora_fx.engine.decoder import Source, part_length
from gralora_fx.engine.limits import DecoderLimits, DecoderSize, TooLargeError
from gralora_fx.errors import ServingError, first_line, shown
from gralora_fx.serving.answer_grammar import AnswerGrammar
from gralora_fx.serving.detokenizer import TextStream
from gralora_fx.serving.encoder_inputs import EncoderInput
from gralora_fx.serving.generation import Generation
from gralora_fx.serving.prompts import Prompts
from gralora_fx.serving.sampling import Sampling
from gralora_fx.serving.stop_search import StopSearch
from gralora_fx.serving.token_choice import Choice, TokenChooser, TokenScore, token_scores

_CHUNK, _CHUNK_OF_MANY = 256, 64  # tokens of each prompt in a step
_FORCED = 32  # tokens that a grammar forces, in a step
Ending: TypeAlias = Literal["stop", "length"]


class Scored(NamedTuple):
    """An answer, or a piece of one, with the log-probabilities of its tokens.

    Attributes:
        content: The text, or the token ids.
        scores: The score of each of its tokens.
    """

    content: Any
    scores: list[TokenScore]


@dataclass(frozen=True)
class TextRequest:
    """A prompt to answer.

    Attributes:
        prompt: Its token ids.
        max_new_tokens: The most tokens to add.
        sampling: How tokens are chosen; its own `max_new_tokens` is not used.
        stop: Strings that end the answer, checked.
        adapter: The adapter to answer with; None for the base.
        scores_prompt: Whether to score the prompt's tokens too, as many of the likeliest beside each as
            `sampling.logprobs` says; the answer may then have no tokens.
        source: What an encoder-decoder's encoder reads; None of a decoder.
        grammar: What the answer's tokens may be; None for any.
        salt: The prompt is taken over from requests with the same one alone, and left to them; None is one too.
        shown: Special tokens that are part of the answer's text.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    scores_prompt: bool = False
    source: EncoderInput | None = None
    grammar: AnswerGrammar | None = None
    salt: str | None = None
    shown: frozenset[int] = frozenset()

    @property
    def arrays(self) -> Source | None:
        """What an encoder-decoder's encoder reads, by name; None of a decoder."""
        return None if self.source is None else self.source.arrays

    def chooser(self, ends: frozenset[int]) -> TokenChooser:
        """What chooses its tokens.

        Args:
            ends: Ids of the tokens that end the answer.
        """
        rules = [] if self.source is None else self.source.processors(self.sampling, self.prompt, self.max_new_tokens)
        grammar = None if self.grammar is None else self.grammar.begin(ends, self.max_new_tokens)
        return TokenChooser(self.sampling, self.prompt, ends, rules, grammar)

    def check(self, limits: DecoderLimits) -> None:
        """Check that a decoder can run it.

        Raises:
            ServingError: The prompt is empty, too long, or holds ids outside the vocabulary, or an option does.
        """
        length = len(self.prompt)
        if not length:
            raise ServingError("the prompt has no tokens; give at least one")
        if (wrong := limits.outside(self.prompt)) is not None:
            raise ServingError(
                f"the prompt holds token {shown(wrong)}, outside the vocabulary of {limits.vocabulary} tokens"
            )
        self.sampling.check_tokens(limits)
        if length + self.max_new_tokens > limits.context:
            raise TooLargeError(
                f"the prompt has {length} tokens and {shown(self.max_new_tokens)} more are asked for, beyond the "
                f"context of {limits.context} tokens{limits.note}; shorten the prompt, or ask for fewer"
            )

    def score_prompt(self, start: int, logits: NDArray[Any]) -> list[TokenScore]:
        """Scores of the prompt's tokens that follow some others.

        Args:
            start: The first position that was read.
            logits: `[positions, vocabulary]`, what the model gives after each that was read.
        """
        tokens = self.prompt[start + 1 : start + 1 + len(logits)]
        return token_scores(logits[: len(tokens)], tokens, self.sampling.logprobs or 0) if tokens else []


class Completion:
    """The tokens of one row and the text they make, cut before a stop string or an end token.

    Text that may be the beginning of a stop string is held back until that is known. Of overlapping stop strings, the
    one that is complete first ends the answer; of those complete at the same time, the longest.

    Attributes:
        ids: The new tokens.
        text: The text so far; empty without a tokenizer.
        has_ended: Whether the answer has ended.
        ending: Why it has, once `extend` has ended it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        ends: frozenset[int],
        stop: Sequence[str],
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """Start an empty completion.

        Args:
            tokenizer: Decodes tokens; None for tokens without text.
            ends: Ids of the tokens that end an answer.
            stop: Strings that end an answer.
            shown: Special tokens that are part of the text.
        """
        self._stream = None if tokenizer is None else TextStream(tokenizer, shown)
        self._ends, self._stops = ends, [StopSearch(string) for string in stop]
        self._held = ""
        self._pieces: list[str] = []
        self.ids: list[int] = []
        self.has_ended = False
        self.ending: Ending | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    def take(self, token: int) -> str:
        """Add a token; returns the new text."""
        if self.has_ended:
            return ""
        if token in self._ends:
            return self.finish()
        self.ids.append(token)
        return "" if self._stream is None else self._add(self._stream.step(token))

    def extend(self, choice: Choice, most: int) -> str:
        """Add the tokens of a choice, up to the end of the answer; returns the new text.

        Args:
            choice: What was chosen.
            most: The most tokens of the answer.
        """
        text, last = "", len(choice.tokens)
        for number, token in enumerate(choice.tokens, 1):
            text += self.take(token)
            if self.has_ended or (choice.completes and number == last):
                self.ending = "stop"
            elif len(self.ids) >= most:
                self.ending = "length"
            if self.ending is not None:
                return text + self.finish()
        return text

    def finish(self) -> str:
        """End the answer; returns the text that was held back."""
        if self.has_ended:
            return ""
        rest = "" if self._stream is None else self._add(self._stream.finish())
        self.has_ended = True
        return rest + self._give(len(self._held))

    def _add(self, piece: str) -> str:
        """Add text; returns the part that cannot be the beginning of a stop string."""
        if not self._stops:
            self._held += piece
            return self._give(len(self._held))
        for index, letter in enumerate(piece):
            complete = [len(stop.string) for stop in self._stops if stop.step(letter)]
            if complete:
                before = self._held + piece[: index + 1]
                self._held, self.has_ended = before[: len(before) - max(complete)], True
                return self._give(len(self._held))
        self._held += piece
        return self._give(len(self._held) - max(stop.matched for stop in self._stops))

    def _give(self, cut: int) -> str:
        """Release the first `cut` characters of the text that is held back."""
        text, self._held = self._held[:cut], self._held[cut:]
        self._pieces.append(text)
        return text


class Completions(Iterator[Any]):
    """The completions of prompts, piece by piece, or all at once."""

    def __init__(
        self,
        generation: Generation,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase | None,
        sampling: Sampling,
        stop: Sequence[str],
        adapter: str | Sequence[str | None] | None = None,
        grammar: AnswerGrammar | None = None,
    ) -> None:
        """Check the prompts, and let a decoder read them.

        Args:
            generation: How the model generates.
            prompts: The prompts to answer.
            tokenizer: For texts, and for stop strings.
            sampling: How tokens are chosen.
            stop: Strings that end an answer.
            adapter: The adapter to answer with, or of each; None for the base.
            grammar: What the tokens of every answer may be; None for any.

        Raises:
            ServingError: The decoder does not take a prompt, an option or the adapter, or it fails.
        """
        most = sampling.new_tokens(prompts.rows, generation.limits, prompts.new_tokens)
        names = names_of_rows(adapter, len(prompts.rows))
        sources: Sequence[EncoderInput | None] = prompts.sources or (None,) * len(prompts.rows)
        self._requests = [
            TextRequest(tuple(row), new, seeded(sampling, index), tuple(stop), name, source=source, grammar=grammar)
            for index, (row, new, name, source) in enumerate(zip(prompts.rows, most, names, sources, strict=True))
        ]
        self._prompts = prompts
        self._gives_scores = sampling.logprobs is not None
        reader = tokenizer if prompts.gives_text or stop else None
        ends = generation.limits.ends if sampling.ends is None else sampling.ends
        self._completions = [Completion(reader, ends, stop) for _ in prompts.rows]
        self._scores: list[list[TokenScore]] = [[] for _ in prompts.rows]
        self._choosers = [request.chooser(ends) for request in self._requests]
        self._rows: _Rows | None = _Rows(generation, self._requests)

    def __next__(self) -> Any:
        """What the next step adds: a text or ids, or a list of them for a list of prompts."""
        going = [row for row, completion in enumerate(self._completions) if not completion.has_ended]
        if self._rows is None or not going:
            self._rows = None  # with what they hold, the cache and the adapter
            raise StopIteration
        try:
            logits = self._rows.step(going)
            choices = {row: self._choosers[row](logits[row]) for row in going}
        except Exception as error:
            self._rows = None  # what was read, and nothing chosen after it, cannot be taken back
            if isinstance(error, ServingError):
                raise
            raise ServingError(f"no token can be chosen ({first_line(error)})") from error
        self._rows.next_tokens = {row: choice.tokens for row, choice in choices.items()}
        pieces: list[Any] = []
        for row, completion in enumerate(self._completions):
            before, text = len(completion.ids), ""
            if row in choices:
                text = completion.extend(choices[row], self._requests[row].max_new_tokens)
            new = completion.ids[before:]
            scores = [choices[row].score for _ in new]
            self._scores[row] += scores  # type: ignore[arg-type]
            piece: Any = text if self._prompts.gives_text else new
            pieces.append(Scored(piece, scores) if self._gives_scores else piece)  # type: ignore[arg-type]
        return pieces[0] if self._prompts.is_single else pieces

    def result(self) -> Any:
        """The whole completions."""
        for _ in self:
            pass
        contents: list[Any] = [each.text if self._prompts.gives_text else each.ids for each in self._completions]
        if self._gives_scores:
            contents = [Scored(*pair) for pair in zip(contents, self._scores, strict=True)]
        return contents[0] if self._prompts.is_single else contents


def seeded(sampling: Sampling, index: int) -> Sampling:
    """The options for one of several answers, which draws by a seed of its own."""
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + index) % 2**31)


class _Rows:
    """Prompts in the rows of a decoder of their own, and the tokens that were chosen and not read yet."""

    def __init__(self, generation: Generation, requests: Sequence[TextRequest]) -> None:
        count, longest = len(requests), max(len(request.prompt) for request in requests)
        capacity = max(len(request.prompt) + request.max_new_tokens for request in requests)
        forced = _FORCED if requests[0].grammar is not None else 1
        chunk = min(max(longest, forced), capacity, _CHUNK if count == 1 else _CHUNK_OF_MANY)
        self._decoder = generation.open_decoder(DecoderSize(count, capacity, chunk))
        self._rows = [self._decoder.open(request.adapter, request.arrays) for request in requests]
        self._logits: dict[int, NDArray[Any]] = {}
        self.next_tokens: dict[int, tuple[int, ...]] = {}
        self._chunk = chunk
        self._read({row: request.prompt for row, request in enumerate(requests)})

    def step(self, going: Sequence[int]) -> dict[int, NDArray[Any]]:
        """The logits `[vocabulary]` after the last token of each row that goes on."""
        self._read({row: tokens for row, tokens in self.next_tokens.items() if row in going})
        return self._logits

    def _read(self, tokens: Mapping[int, Sequence[int]]) -> None:
        while tokens:
            counts = {row: part_length(len(left), self._chunk) for row, left in tokens.items()}
            logits_of = self._decoder.step({self._rows[row]: tokens[row][:count] for row, count in counts.items()})
            for row in tokens:
                logits = logits_of[self._rows[row]]
                self._logits[row] = logits[-1].copy() if self._decoder.gives_all else logits
            tokens = {row: left[counts[row] :] for row, left in tokens.items() if counts[row] < len(left)}
