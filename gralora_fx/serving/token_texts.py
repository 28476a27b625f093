"""Single tokens as text and as bytes."""

from __future__ import annotations

import re
from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-F]{2})>\Z")


class TokenTexts:
    """What each token adds to a text; a token may be a part of a letter, whose bytes are then no text by themselves."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read how the tokenizer writes bytes.

        Args:
            tokenizer: The tokenizer.
        """
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes of a token; none for an id outside the vocabulary."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def is_special(self, token: int) -> bool:
        """Whether a token is left out of an answer's text."""
        return token in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return frozenset(self._tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}

    @cached_property
    def _byte_letters(self) -> dict[str, int]:
        """The letters that stand for bytes, where the tokenizer has such; else none."""
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        if decoder is None or b'"ByteLevel"' not in decoder.__getstate__():
            return {}
        return {letter: byte for byte, letter in bytes_to_unicode().items()}

    def _read(self, token: int) -> bytes:
        try:
            name = self._tokenizer.convert_ids_to_tokens(token)
        except (IndexError, KeyError, OverflowError):
            return b""
        if not isinstance(name, str):
            return b""
        if self.is_special(token):
            return name.encode()
        if found := _BYTE.match(name):
            return bytes([int(found[1], 16)])
        if self._byte_letters:
            letters = self._byte_letters
            return bytes(letters[c] for c in name) if all(c in letters for c in name) else name.encode()
        # the first token of a text may lose its space, so it is read after itself
        once, twice = (self._tokenizer.decode([token] * count, clean_up_tokenization_spaces=False) for count in (1, 2))
        return str(twice).removeprefix(str(once)).encode()
