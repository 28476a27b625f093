"""Answers in the forms of OpenAI's protocol."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from gralora_fx.serving.http.openai_logprobs import LogprobWriter
from gralora_fx.serving.scheduling.text_jobs import Piece, TextRequest
from gralora_fx.serving.token_texts import TokenTexts


@dataclass(frozen=True)
class Form:
    """How the answers to one request are written.

    Attributes:
        model: The model's name, as the request gives it.
        is_chat: Whether they are messages.
        id: The answer's id.
        created: When it was begun, in seconds.
    """

    model: str
    is_chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], *, is_chunk: bool, **more: Any) -> dict[str, Any]:
        """The object around some choices."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        name = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}"
        return {
            "id": name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


class Choice:
    """One answer, written piece by piece; the pieces of a stream together are the whole answer."""

    def __init__(self, form: Form, index: int, request: TextRequest, echo: str, texts: TokenTexts) -> None:
        """Begin an answer.

        Args:
            form: How it is written.
            index: Its number.
            request: What it answers.
            echo: The text that it begins with.
            texts: Tokens as text.
        """
        self._form, self._index, self._request = form, index, request
        self._echo = echo
        self._writer = None
        if request.sampling.logprobs is not None:
            self._writer = LogprobWriter(texts, is_chat=form.is_chat)

    def first(self) -> dict[str, Any]:
        """What a streamed message begins with."""
        return self._fields({"delta": {"role": "assistant", "content": ""}}, None, None)

    def part(self, piece: Piece) -> dict[str, Any]:
        """A piece of a streamed answer."""
        text, self._echo = self._echo + piece.text, ""
        logprobs = self._logprobs(piece)
        content: dict[str, Any] = {"text": text}
        if self._form.is_chat:
            content = {"delta": {"content": text} if text or piece.scores else {}}
        return self._fields(content, logprobs, piece.ending)

    def whole(self, piece: Piece) -> dict[str, Any]:
        """A whole answer, as a single piece."""
        content: dict[str, Any] = {"text": self._echo + piece.text}
        if self._form.is_chat:
            content = {"message": {"role": "assistant", "content": piece.text, "refusal": None, "annotations": []}}
        return self._fields(content, self._logprobs(piece), piece.ending)

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """The scores of a piece; those of the prompt come with the first."""
        if self._writer is None:
            return None
        first = self._request.prompt[0] if self._request.scores_prompt else None
        if first is None or self._writer.is_begun:
            return self._writer.write(piece.scores)
        return self._writer.write((*piece.prompt_scores, *piece.scores), first)

    def _fields(self, content: dict[str, Any], logprobs: dict[str, Any] | None, ending: str | None) -> dict[str, Any]:
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": ending}
