"""Answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gralora_fx.serving.http.text_answers import TextAnswers

END = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; the answers are given up when the client goes away, even before the first event."""

    def __init__(self, answers: TextAnswers, events: AsyncIterator[bytes]) -> None:
        """Begin a stream.

        Args:
            answers: What is answered.
            events: The events, as `event` writes them.
        """
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


def event(body: dict[str, Any]) -> bytes:
    """An event with an object; as ASCII, since some clients split lines at other letters too, such as U+2028."""
    text = orjson.dumps(body)
    return b"data: " + (text if text.isascii() else json.dumps(body).encode()) + b"\n\n"
