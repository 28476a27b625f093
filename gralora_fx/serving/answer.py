"""The answer to one prompt, token by token: its text as it grows, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gralora_fx.serving.text_stream import TextStream


class Answer:
    """The tokens of one row and the text they make, cut before a stop string or an end token.

    Text that may turn out to be the beginning of a stop string is held back until that is known. Of stop strings that
    overlap the one that is complete first ends the answer; of those complete at once, the longest.

    Attributes:
        ids: The new tokens.
        text: The text given so far; empty without a tokenizer.
        has_ended: Whether nothing more is taken.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, ends: frozenset[int], stop: Sequence[str]) -> None:
        """Begin an empty answer.

        Args:
            tokenizer: Makes text of tokens; None for tokens alone.
            ends: Ids of the tokens that end an answer.
            stop: Strings that end an answer.
        """
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._ends, self._stops = ends, [_Stop(string) for string in stop]
        self._held = ""
        self._pieces: list[str] = []
        self.ids: list[int] = []
        self.has_ended = False

    @property
    def text(self) -> str:
        """The text given so far."""
        return "".join(self._pieces)

    def take(self, token: int) -> str:
        """Take a token; the result is the text that it adds."""
        if self.has_ended:
            return ""
        if token in self._ends:
            return self.finish()
        self.ids.append(token)
        return "" if self._stream is None else self._add(self._stream.step(token))

    def finish(self) -> str:
        """End the answer; the result is the text that was held back."""
        if self.has_ended:
            return ""
        rest = "" if self._stream is None else self._add(self._stream.finish())
        self.has_ended = True
        return rest + self._give(len(self._held))

    def _add(self, piece: str) -> str:
        """Take text; the result is what cannot begin a stop string."""
        if not self._stops:
            self._held += piece
            return self._give(len(self._held))
        for place, letter in enumerate(piece):
            complete = [len(stop.string) for stop in self._stops if stop.step(letter)]
            if complete:
                before = self._held + piece[: place + 1]
                self._held, self.has_ended = before[: len(before) - max(complete)], True
                return self._give(len(self._held))
        self._held += piece
        return self._give(len(self._held) - max(stop.matched for stop in self._stops))

    def _give(self, cut: int) -> str:
        """Give the first `cut` letters of the text that is held back."""
        given, self._held = self._held[:cut], self._held[cut:]
        self._pieces.append(given)
        return given


class _Stop:
    """How much of a stop string the text ends with: the search of Knuth, Morris and Pratt, a letter at a time.

    Its table is made as far as the text has matched, so a long string costs no more than the text.

    Attributes:
        string: The stop string.
        matched: How many of its letters the text ends with.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._borders = [0]  # of each beginning: the length of its longest proper beginning that is also its end

    def step(self, letter: str) -> bool:
        """Take a letter; the result is whether the string is complete."""
        while self.matched and self.string[self.matched] != letter:
            self.matched = self._borders[self.matched - 1]
        if self.string[self.matched] == letter:
            self.matched += 1
            self._extend()
        return self.matched == len(self.string)

    def _extend(self) -> None:
        """Make the table as long as the match."""
        while len(self._borders) < self.matched:
            letter, border = self.string[len(self._borders)], self._borders[-1]
            while border and self.string[border] != letter:
                border = self._borders[border - 1]
            self._borders.append(border + (self.string[border] == letter))
