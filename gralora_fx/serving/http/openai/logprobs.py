"""Log-probabilities in the forms of OpenAI's protocol."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from gralora_fx.serving.detokenizer import TokenBytes
from gralora_fx.serving.token_choice import TokenScore

_LEAST = -9999.0  # in the place of minus infinity, which JSON does not have


class LogprobWriter:
    """Writes the scores of one answer, piece by piece.

    Attributes:
        is_begun: Whether a piece was written.
    """

    def __init__(self, texts: TokenBytes, *, is_chat: bool) -> None:
        """Begin at the first letter.

        Args:
            texts: Tokens as text.
            is_chat: Whether the answer is a message.
        """
        self._texts, self._is_chat = texts, is_chat
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._letters = 0
        self.is_begun = False

    def write(self, scores: Sequence[TokenScore], first: int | None = None) -> dict[str, Any]:
        """The `logprobs` of some tokens.

        Args:
            scores: Their scores.
            first: A token before them that has no score, of a text that begins with it.
        """
        self.is_begun = True
        if self._is_chat:
            return {"content": [self._entry(score) for score in scores], "refusal": None}
        tokens = [*([] if first is None else [first]), *(score.token for score in scores)]
        missing: list[Any] = [None] * (len(tokens) - len(scores))
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [*missing, *(_finite(score.logprob) for score in scores)],
            "top_logprobs": [*missing, *(self._top(score) for score in scores)],
            "text_offset": [self._offset(token) for token in tokens],
        }

    def _entry(self, score: TokenScore) -> dict[str, Any]:
        top = [self._token(*pair) for pair in score.top]
        return {**self._token(score.token, score.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        utf8 = self._texts.bytes_of(token)
        return {"token": utf8.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(utf8)}

    def _top(self, score: TokenScore) -> dict[str, float]:
        """The likeliest tokens by name, and the one that was chosen if it is not among them."""
        pairs = [*score.top, *([] if score.token in dict(score.top) else [(score.token, score.logprob)])]
        return {self._name(token): _finite(logprob) for token, logprob in reversed(pairs)}

    def _name(self, token: int) -> str:
        """A token as text; a part of a letter as its bytes."""
        utf8 = self._texts.bytes_of(token)
        try:
            return utf8.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in utf8)

    def _offset(self, token: int) -> int:
        """Where a token's text begins in the answer's."""
        start = self._letters
        if not self._texts.is_special(token):
            self._letters += len(self._decoder.decode(self._texts.bytes_of(token)))
        return start


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
