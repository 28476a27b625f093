"""A request for one answer, and the completion as it grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from numpy.typing import NDArray

from gralora_fx.errors import ServingError, shown
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.engine.limits import DecoderLimits, TooLargeError
from gralora_fx.run.generate.answer_options import AnswerOptions
from gralora_fx.run.generate.detokenizer import TextStream
from gralora_fx.run.generate.token_choice import Choice, TokenChooser, TokenScore, token_scores

if TYPE_CHECKING:
    from gralora_fx.core.loading.text_tokenizer import TextTokenizer
    from gralora_fx.run.generate.prompts import EncoderInput

Ending: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True)
class TextRequest:
    """A prompt to answer."""

    prompt: tuple[int, ...]  # its token ids
    max_new_tokens: int  # maximum tokens to add
    # options of the answer; their `sampling.max_new_tokens` is not used
    options: AnswerOptions = field(default_factory=AnswerOptions)
    adapter: str | None = None  # the adapter to answer with; None for the base
    source: EncoderInput | None = None  # encoder input of an encoder-decoder; None for a decoder
    given: Source | None = None  # tensors, by name, that replace a decoder's first tokens; None for text alone

    @property
    def max_length(self) -> int:
        """Maximum tokens of its row: the prompt and the answer."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def arrays(self) -> Source | None:
        """Arrays to open a row with: the encoder's input, or replacements of a decoder's tokens."""
        return self.given if self.source is None else self.source.arrays

    def chooser(self, ends: frozenset[int]) -> TokenChooser:
        """Return the token chooser of its answer."""
        sampling, constraint = self.options.sampling, self.options.constraint
        rules = [] if self.source is None else self.source.processors(sampling, self.prompt, self.max_new_tokens)
        begun = None if constraint is None else constraint.begin(ends, self.max_new_tokens)
        return TokenChooser(sampling, self.prompt, ends, rules, begun)

    def check(self, limits: DecoderLimits) -> None:
        """Check that a decoder can run it."""
        length = len(self.prompt)
        if not length:
            raise ServingError("the prompt has no tokens; give at least one")
        if (wrong := limits.outside(self.prompt)) is not None:
            raise ServingError(
                f"the prompt holds token {shown(wrong)}, outside the vocabulary of {limits.vocabulary} tokens"
            )
        self.options.sampling.check_tokens(limits)
        if length + self.max_new_tokens > limits.context:
            raise TooLargeError(
                f"the prompt has {length} tokens and {shown(self.max_new_tokens)} more are asked for, beyond the "
                f"context of {limits.context} tokens{limits.note}; shorten the prompt, or ask for fewer"
            )

    def score_prompt(self, start: int, logits: NDArray[Any]) -> list[TokenScore]:
        """Return scores of the prompt's tokens after positions `start` on; logits are `[positions, vocabulary]`."""
        tokens = self.prompt[start + 1 : start + 1 + len(logits)]
        return token_scores(logits[: len(tokens)], tokens, self.options.sampling.logprobs or 0) if tokens else []


class Completion:
    """The tokens of one row and their text, cut before a stop string or an end token.

    Text that may begin a stop string is held back until that is certain. Of overlapping stop strings, the one that is
    complete first ends the answer; of those complete at the same time, the longest.

    Attributes:
        ids: The new tokens.
        text: The text so far; empty without a tokenizer.
        has_ended: Whether the answer has ended.
        ending: The finish reason, once `extend` has ended it.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        ends: frozenset[int],
        stop: Sequence[str],
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """Start an empty completion."""
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
        """Append a token; return the new text."""
        if self.has_ended:
            return ""
        if token in self._ends:
            return self.finish()
        self.ids.append(token)
        return "" if self._stream is None else self._add(self._stream.step(token))

    def extend(self, choice: Choice, most: int) -> str:
        """Append a choice's tokens, up to the end of the answer; return the new text."""
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
        """End the answer; return the text held back."""
        if self.has_ended:
            return ""
        rest = "" if self._stream is None else self._add(self._stream.finish())
        self.has_ended = True
        return rest + self._give(len(self._held))

    def _add(self, piece: str) -> str:
        """Append text; return the part that cannot begin a stop string."""
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
        """Release the first `cut` characters of the text held back."""
        text, self._held = self._held[:cut], self._held[cut:]
        self._pieces.append(text)
        return text


class StopSearch:
    """An incremental Knuth-Morris-Pratt search for a stop string, one character at a time.

    Its table is extended only as far as the text has matched, so a long string costs no more than the text.
    """

    def __init__(self, string: str) -> None:
        """Start without text."""
        self.string = string
        self.matched = 0
        self._borders = [0]  # for each prefix: the length of its longest proper prefix that is also its suffix

    def step(self, letter: str) -> bool:
        """Append a character; return whether the string is complete."""
        while self.matched and self.string[self.matched] != letter:
            self.matched = self._borders[self.matched - 1]
        if self.string[self.matched] == letter:
            self.matched += 1
            self._extend()
        return self.matched == len(self.string)

    def _extend(self) -> None:
        """Extend the table to the length of the match."""
        while len(self._borders) < self.matched:
            letter, border = self.string[len(self._borders)], self._borders[-1]
            while border and self.string[border] != letter:
                border = self._borders[border - 1]
            self._borders.append(border + (self.string[border] == letter))
