"""A lower bound on the number of tokens in a text, without tokenizing it, which takes seconds for megabytes.

In a token of n characters, each character counts as an n-th of a token. So the longest token that contains a character
bounds that character's share from below, and the sum over all characters of a text bounds its number of tokens.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gralora_fx.core.loading.text_tokenizer import BYTE_LETTERS

_PART = 2**16  # characters counted at once
_SLACK = 8  # tokens by which two parts may count more than the text of both, since normalizers look beyond one
# pre-tokenizers that keep every character, and ones that drop white space; others are unknown
_KEEPING = ("ByteLevel", "Digits", "FixedLength", "Metaspace", "Punctuation", "Split", "UnicodeScripts")
_SPLITTING = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
_WORDS = ("WordLevel", "WordPiece")  # models with a token for any word that they do not know
# normalizers that look at few characters around each
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_LOCAL = (*_FORMS, "BertNormalizer", "ByteLevel", "Lowercase", "Nmt", "Precompiled", "Prepend", "Strip", "StripAccents")
_SPACES = " {2,}"  # the expression in normalizers that were SentencePiece's
_WORD = re.compile(
    r"[^\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
)  # splits at Unicode white space
_Parts = Mapping[str, Any]


@dataclass(frozen=True)
class TokenBound:
    """A lower bound on the number of a text's tokens."""

    normalize: Callable[[str], str]  # the tokenizer's normalization
    count: Callable[[str], float]  # the least number of tokens in a normalized text
    part: int  # number of characters that may be normalized and counted at once
    longest: int  # characters, or bytes for a byte-level tokenizer, of the longest token

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBound | None:
        """Return the bound of a tokenizer; None if its tokens are unknown, as for one not made by `tokenizers`."""
        size, bound = _known.get(tokenizer, (None, None))
        if size != len(tokenizer):  # else tokens were added since
            backend = getattr(tokenizer, "backend_tokenizer", None)
            bound = _bound_of(backend) if isinstance(backend, Tokenizer) else None
            _known[tokenizer] = len(tokenizer), bound
        return bound

    def exceeds(self, text: str, most: int) -> bool:
        """Return whether a text certainly has more than `most` tokens."""
        least = 0.0
        for start in range(0, len(text), self.part):
            least += self.count(self.normalize(text[start : start + self.part])) - _SLACK
            if least > most:
                return True
        return False


_known: WeakKeyDictionary[Any, tuple[int, TokenBound | None]] = WeakKeyDictionary()


def surely_exceeds(text: str, most: int, tokenizer: Any) -> bool:
    """Return whether a text is so long that it certainly has more than `most` tokens."""
    if len(text) <= most:  # short enough to tokenize
        return False
    bound = TokenBound.of(tokenizer)
    return bound is not None and bound.exceeds(text, most)


def _bound_of(backend: Tokenizer) -> TokenBound | None:
    try:
        parts: _Parts = json.loads(backend.to_str())
    except Exception:  # noqa: BLE001 a part that is written in Python has no text, and raises what it likes
        return None
    splits, normalizers = [*_flat(parts["pre_tokenizer"])], [*_flat(parts["normalizer"])]
    if not all(map(_is_known, splits)):
        return None
    normalize = str if backend.normalizer is None else backend.normalizer.normalize_str
    part = _PART if all(map(_is_local, normalizers)) else sys.maxsize
    contents = [entry["content"] for entry in parts["added_tokens"]]
    contents += [normalize(content) for content in contents]
    kinds = {split["type"] for split in splits}
    if parts["model"]["type"] in _WORDS:
        if kinds.isdisjoint(_SPLITTING):
            return None
        most_words = max([1, *(len(_WORD.findall(content)) for content in contents)])
        return TokenBound(normalize, lambda text: len(_WORD.findall(text)) / most_words, part, 0)
    strips = not kinds.isdisjoint(_SPLITTING) or any(
        token["lstrip"] or token["rstrip"] for token in parts["added_tokens"]
    )
    is_bytes = "ByteLevel" in kinds
    if is_bytes:
        contents = ["".join(BYTE_LETTERS[byte] for byte in content.encode()) for content in contents]
    shares = _Shares(parts["model"], contents)
    table = shares.of_bytes() if is_bytes else shares.of_letters()
    for split in splits:
        if split["type"] == "Metaspace":
            table[ord(" ")] = table[ord(split["replacement"])]
    encoding, dtype = ("utf-8", np.uint8) if is_bytes else ("utf-32-le", np.uint32)

    def count(text: str) -> float:
        kept = "".join(text.split()) if strips else text
        return float(table[np.frombuffer(kept.encode(encoding, "replace"), dtype)].sum())

    return TokenBound(normalize, count, part, max(shares.longest.values(), default=1))


class _Shares:
    """The least share of a token for each character: 0 if it may be dropped or be part of an unknown token.

    `longest` is the number of characters in the longest token that contains each.
    """

    def __init__(self, model: _Parts, contents: Iterable[str]) -> None:
        """Compute them from a vocabulary."""
        self._tokens = {entry if isinstance(entry, str) else entry[0] for entry in model["vocab"]}
        self._before, self._after = (model.get(n) or "" for n in ("continuing_subword_prefix", "end_of_word_suffix"))
        # whether unknown characters become bytes, one token each
        self._has_bytes = bool(model.get("byte_fallback")) and all(f"<0x{n:02X}>" in self._tokens for n in range(256))
        self.longest: dict[str, int] = {}
        for token in (*self._tokens, *contents):
            size = len(token)
            for letter in token:
                if self.longest.get(letter, 0) < size:
                    self.longest[letter] = size

    def of_bytes(self) -> NDArray[np.float32]:
        """Return the share of each byte, `[256]`, for a vocabulary whose characters stand for bytes."""
        return np.array([self._share(BYTE_LETTERS[byte]) for byte in range(256)], np.float32)

    def of_letters(self) -> NDArray[np.float32]:
        """Return the share of each character, by its code point."""
        table = np.full(sys.maxunicode + 1, self._share(""), np.float32)
        for letter in self.longest:
            table[ord(letter)] = self._share(letter)
        return table

    def _share(self, letter: str) -> float:
        forms = (letter, self._before + letter, letter + self._after)
        if self._has_bytes or (letter in self.longest and self._tokens.issuperset(forms)):
            return 1 / self.longest.get(letter, 1)
        return 0.0


def _flat(part: _Parts | None) -> Iterator[_Parts]:
    """Yield a part of a tokenizer, or the parts of a sequence."""
    if part is None:
        return
    inner = part.get("pretokenizers") or part.get("normalizers")
    if part["type"] != "Sequence" or inner is None:
        yield part
        return
    for each in inner:
        yield from _flat(each)


def _is_known(split: _Parts) -> bool:
    return split["type"] in (*_KEEPING, *_SPLITTING) and split.get("behavior") != "Removed"


def _is_local(normalizer: _Parts) -> bool:
    if normalizer["type"] != "Replace":
        return normalizer["type"] in _LOCAL
    pattern = normalizer["pattern"]
    return pattern.get("Regex") == _SPACES or 0 < len(pattern.get("String", "")) <= _SLACK
