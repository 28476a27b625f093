"""The answer to one prompt, token by token: its text as it grows, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextStream(Protocol):
    """Makes text of tokens as they come."""

    def step(self, token: int) -> str:
        """The text that a token adds, which waits where a character is not complete yet."""


class Answer:
    """The tokens of one row and the text they make, cut before a stop string or an end token.

    Text that may turn out to be the beginning of a stop string is held back until that is known.

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
        self._stream = None if tokenizer is None else text_stream(tokenizer)
        self._ends, self._stop = ends, tuple(stop)
        self._held = ""
        self.ids: list[int] = []
        self.text = ""
        self.has_ended = False

    def take(self, token: int) -> str:
        """Take a token; the result is the text that it adds."""
        if self.has_ended:
            return ""
        if token in self._ends:
            return self.finish()
        self.ids.append(token)
        if self._stream is None:
            return ""
        self._held += self._stream.step(token)
        places = [place for string in self._stop if (place := self._held.find(string)) >= 0]
        if places:
            self._held, self.has_ended = self._held[: min(places)], True
        return self._give(0 if places else _overlap(self._held, self._stop))

    def finish(self) -> str:
        """End the answer; the result is the text that was held back."""
        self.has_ended = True
        return self._give(0)

    def _give(self, kept: int) -> str:
        """Give the text that is held back but for its last `kept` letters."""
        cut = len(self._held) - kept
        given, self._held = self._held[:cut], self._held[cut:]
        self.text += given
        return given


def text_stream(tokenizer: PreTrainedTokenizerBase) -> TextStream:
    """The stream of a tokenizer: the tokenizers library's own where it can be had."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _WholeText(tokenizer) if backend is None else _Incremental(backend)


class _Incremental:
    """The tokenizers library's stream, which decodes a few tokens at every step."""

    def __init__(self, backend: Any) -> None:
        self._backend, self._stream = backend, DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str:
        return self._stream.step(self._backend, token) or ""


class _WholeText:
    """Decodes the whole text at every step: tokenizers written in Python have no stream."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._text = ""

    def step(self, token: int) -> str:
        self._ids.append(token)
        whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if whole.endswith("\ufffd"):  # a character of several tokens
            return ""
        piece, self._text = whole[len(self._text) :], whole
        return piece


def _overlap(text: str, stop: Sequence[str]) -> int:
    """How many letters at the end of a text may begin a stop string."""
    lengths = (length for string in stop for length in range(1, len(string)) if text.endswith(string[:length]))
    return max(lengths, default=0)
