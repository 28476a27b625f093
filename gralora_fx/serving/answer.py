"""The answer to one prompt, token by token: its growing text and its end."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gralora_fx.serving.text_stream import TextStream


class Answer:
    """The tokens of one row and the text they make, cut before a stop string or an end token.

    Text that may be the beginning of a stop string is held back until that is known. Of overlapping stop strings, the
    one that is complete first ends the answer; of those complete at the same time, the longest.

    Attributes:
        ids: The new tokens.
        text: The text so far; empty without a tokenizer.
        has_ended: Whether the answer has ended.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, ends: frozenset[int], stop: Sequence[str]) -> None:
        """Start an empty answer.

        Args:
            tokenizer: Decodes tokens; None for tokens without text.
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


class _Stop:
    """An incremental Knuth-Morris-Pratt search for a stop string, one character at a time.

    Its table is extended only as far as the text has matched, so a long string costs no more than the text.

    Attributes:
        string: The stop string.
        matched: The length of its longest prefix that the text ends with.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._borders = [0]  # for each prefix: the length of its longest proper prefix that is also its suffix

    def step(self, letter: str) -> bool:
        """Add a character; returns whether the string is complete."""
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
