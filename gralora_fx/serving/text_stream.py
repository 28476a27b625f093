"""Incremental decoding: the text of `tokenizer.decode`, piece by piece as tokens come."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-F]{2}>\Z")
_UNFINISHED = "\ufffd"
_LEAST, _MOST = 8, 32  # tokens that are decoded again in a step, at least and at most


class TextStream:
    """The text of a growing answer: the pieces together are `tokenizer.decode(ids, skip_special_tokens=True)`.

    A step decodes only the last few tokens, with some context on which the new text may depend: a first token loses its
    space. Text that later tokens may change is held back: a character of several tokens, a run of byte tokens (which
    form text together or not at all), and the last word if spaces are cleaned up.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Start an empty text."""
        self._tokenizer = tokenizer
        self._skipped = _special_tokens(tokenizer)
        self._window: list[int] = []
        self._given = 0  # letters of the window's text
        self._cleaner = _Cleaner(tokenizer) if _cleans_spaces(tokenizer) else None

    def step(self, token: int) -> str:
        """The text that a token adds."""
        name = self._name_of(token)
        if token in self._skipped or name is None:
            return ""
        self._window.append(token)
        if _BYTE.match(name):
            return ""
        text = self._decode(self._window)
        piece = self._take(text, len(text) - text.endswith(_UNFINISHED))
        if len(self._window) > _MOST:
            self._shorten()
        return piece if self._cleaner is None else self._cleaner.step(piece)

    def finish(self) -> str:
        """The text that was held back."""
        text = self._decode(self._window)
        piece = self._take(text, len(text))
        return piece if self._cleaner is None else self._cleaner.finish(piece)

    def _take(self, text: str, end: int) -> str:
        piece = text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _shorten(self) -> None:
        """Drop tokens on which new text no longer depends; a run of byte tokens is not cut."""
        start = len(self._window) - _LEAST
        while start > 0 and _BYTE.match(self._name_of(self._window[start]) or ""):
            start -= 1
        waiting = len(self._decode(self._window)) - self._given
        self._window = self._window[start:]
        self._given = len(self._decode(self._window)) - waiting

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _name_of(self, token: int) -> str | None:
        """A token of the vocabulary; None for an id outside of it, which decodes to nothing."""
        try:
            name = self._tokenizer.convert_ids_to_tokens(token)
        except (IndexError, KeyError, OverflowError):
            return None
        return name if isinstance(name, str) else None


class _Cleaner:
    """Cleans up spaces before punctuation in a growing text, as word tokenizers do."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._held = ""

    def step(self, piece: str) -> str:
        """Add a piece; returns the text before the last word, cleaned."""
        self._held += piece
        cut = self._held.rfind(" ")
        while cut > 0 and (self._held[cut - 1] == " " or self._held[max(cut - 2, 0) : cut] == " '"):
            cut = self._held.rfind(" ", 0, cut)
        cut = max(cut, 0)
        ready, self._held = self._held[:cut], self._held[cut:]
        return self._clean(ready)

    def finish(self, piece: str) -> str:
        """The rest of the text."""
        held, self._held = self._held + piece, ""
        return self._clean(held)

    def _clean(self, text: str) -> str:
        return str(self._tokenizer.clean_up_tokenization(text))


def _cleans_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `decode` cleans up spaces; transformers does not for BPE, unless a second option is set."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_told = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return backend is None or type(backend.model).__name__ != "BPE" or bool(is_told)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that `skip_special_tokens` skips."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return frozenset(getattr(tokenizer, "all_special_ids", ()))
    return frozenset(index for index, token in backend.get_added_tokens_decoder().items() if token.special)
