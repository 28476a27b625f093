"""Tokens to text, streamed, and tokens to bytes, one by one."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gralora_fx.core.loading.text_tokenizer import TextTokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>\Z")
_UNFINISHED = "\ufffd"
_LEAST, _MOST = 8, 32  # minimum and maximum tokens decoded again per step


class TextStream:
    """The text of a growing answer: its pieces add up to `tokenizer.decode(ids, skip_special_tokens=True)`.

    With `shown` special tokens, these are kept, and the text before, between and after them is decoded separately.

    A step decodes only the last few tokens, with enough context for the new text: a first token loses its space. Text
    that later tokens may change is held back: a character of several tokens, a run of byte tokens (which form text
    together or not at all), and the last word if spaces are cleaned up.
    """

    def __init__(self, tokenizer: TextTokenizer, shown: frozenset[int] = frozenset()) -> None:
        """Start with no text."""
        from gralora_fx.core.loading.text_tokenizer import cleans_spaces

        self._tokenizer = tokenizer
        special = _special_tokens(tokenizer)
        self._skipped, self._shown = special - shown, special & shown
        self._window: list[int] = []
        self._released = 0  # released characters of the window's text
        self._cleaner = _Cleaner(tokenizer) if cleans_spaces(tokenizer) else None

    def step(self, token: int) -> str:
        """Append a token; return the new text."""
        name = _name_of(self._tokenizer, token)
        if token in self._skipped or name is None:
            return ""
        if token in self._shown:
            piece = self.finish() + name
            self._window, self._released = [], 0
            return piece
        self._window.append(token)
        if _BYTE.match(name):
            return ""
        text = self._decode()
        piece = self._take(text, len(text) - text.endswith(_UNFINISHED))
        if len(self._window) > _MOST:
            self._shorten()
        return piece if self._cleaner is None else self._cleaner.step(piece)

    def finish(self) -> str:
        """Return the text held back."""
        text = self._decode()
        piece = self._take(text, len(text))
        return piece if self._cleaner is None else self._cleaner.finish(piece)

    def _take(self, text: str, end: int) -> str:
        piece = text[self._released : end]
        self._released = max(self._released, end)
        return piece

    def _shorten(self) -> None:
        """Drop tokens on which new text no longer depends; runs of byte tokens are not cut."""
        start = len(self._window) - _LEAST
        while start > 0 and _BYTE.match(_name_of(self._tokenizer, self._window[start]) or ""):
            start -= 1
        waiting = len(self._decode()) - self._released
        self._window = self._window[start:]
        self._released = len(self._decode()) - waiting

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TokenBytes:
    """Each token's bytes in a text; a token may be part of a character, not text by itself."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Determine how the tokenizer represents bytes."""
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Return a token's UTF-8 bytes; empty for an id outside the vocabulary."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def is_special(self, token: int) -> bool:
        """Return whether a token is left out of an answer's text."""
        return token in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        return _special_tokens(self._tokenizer)

    @cached_property
    def _byte_letters(self) -> dict[str, int]:
        """Letters that represent bytes in a byte-level tokenizer; empty for others."""
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        if decoder is None or b'"ByteLevel"' not in decoder.__getstate__():
            return {}
        from gralora_fx.core.loading.text_tokenizer import BYTE_LETTERS

        return {letter: byte for byte, letter in BYTE_LETTERS.items()}

    def _read(self, token: int) -> bytes:
        name = _name_of(self._tokenizer, token)
        if name is None:
            return b""
        if self.is_special(token):
            return name.encode()
        if found := _BYTE.match(name):
            return bytes([int(found[1], 16)])
        if self._byte_letters:
            letters = self._byte_letters
            return bytes(letters[c] for c in name) if all(c in letters for c in name) else name.encode()
        # a text's first token may lose its space, so decode it after itself
        once, twice = (self._tokenizer.decode([token] * count, clean_up_tokenization_spaces=False) for count in (1, 2))
        return str(twice).removeprefix(str(once)).encode()


class _Cleaner:
    """Cleans up spaces before punctuation in a growing text, as word tokenizers do."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._held = ""

    def step(self, piece: str) -> str:
        """Append a piece; return the text before the last word, cleaned."""
        self._held += piece
        cut = self._held.rfind(" ")
        while cut > 0 and (
            self._held[cut - 1] == " " or self._held[max(cut - 2, 0) : cut] in (" '", " n")
        ):  # such as n't
            cut = self._held.rfind(" ", 0, cut)
        cut = max(cut, 0)
        ready, self._held = self._held[:cut], self._held[cut:]
        return self._clean(ready)

    def finish(self, piece: str) -> str:
        """Return the rest of the text."""
        held, self._held = self._held + piece, ""
        return self._clean(held)

    def _clean(self, text: str) -> str:
        return str(self._tokenizer.clean_up_tokenization(text))


def _special_tokens(tokenizer: TextTokenizer) -> frozenset[int]:
    """Return ids of the tokens that `skip_special_tokens` skips."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return frozenset(getattr(tokenizer, "all_special_ids", ()))
    return frozenset(index for index, token in backend.get_added_tokens_decoder().items() if token.special)


def _name_of(tokenizer: TextTokenizer, token: int) -> str | None:
    """Return a token of the vocabulary; None for an id outside of it, which decodes to nothing."""
    try:
        name = tokenizer.convert_ids_to_tokens(token)
    except (IndexError, KeyError, OverflowError):
        return None
    return name if isinstance(name, str) else None
