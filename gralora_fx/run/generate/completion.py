"""A prompt to answer, and its completion, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gralora_fx.errors import ServingError, shown
from gralora_fx.run.engine.bounded_rows import Source
from gralora_fx.run.engine.limits import DecoderLimits, TooLargeError
from gralora_fx.run.generate.detokenizer import TextStream
from gralora_fx.run.generate.sampling import Sampling
from gralora_fx.run.generate.stop_search import StopSearch
from gralora_fx.run.generate.token_choice import Choice, TokenChooser, TokenScore, token_scores

if TYPE_CHECKING:
    from gralora_fx.run.generate.answer_grammar import AnswerGrammar
    from gralora_fx.run.generate.encoder_inputs import EncoderInput

Ending: TypeAlias = Literal["stop", "length"]


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
        images: What images put in the place of a decoder's first tokens, by name; None of text alone.
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
    images: Source | None = None

    @property
    def max_length(self) -> int:
        """The most tokens of its row: the prompt and the answer."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def arrays(self) -> Source | None:
        """What a row is opened with: what an encoder reads, or what images put in the place of a decoder's tokens."""
        return self.images if self.source is None else self.source.arrays

    def chooser(self, ends: frozenset[int]) -> TokenChooser:
        """What chooses its tokens."""
        rules = [] if self.source is None else self.source.processors(self.sampling, self.prompt, self.max_new_tokens)
        grammar = None if self.grammar is None else self.grammar.begin(ends, self.max_new_tokens)
        return TokenChooser(self.sampling, self.prompt, ends, rules, grammar)

    def check(self, limits: DecoderLimits) -> None:
        """Check that a decoder can run it."""
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
        """Add a token; returns the new text."""
        if self.has_ended:
            return ""
        if token in self._ends:
            return self.finish()
        self.ids.append(token)
        return "" if self._stream is None else self._add(self._stream.step(token))

    def extend(self, choice: Choice, most: int) -> str:
        """Add the tokens of a choice, up to the end of the answer; returns the new text."""
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


def seeded(sampling: Sampling, index: int) -> Sampling:
    """The options for one of several answers, which draws by a seed of its own."""
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + index) % 2**31)
