"""A request as data, to be answered by an ASGI app in another process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message

_SCOPE = ("asgi", "client", "headers", "http_version", "method", "path", "query_string", "raw_path", "scheme", "server")
_MODEL_PATHS = "/v2/models/"


@dataclass(frozen=True)
class AsgiRequest:
    """A request that was read whole.

    Attributes:
        scope: What ASGI says of it, as plain data.
        body: Its body.
    """

    scope: dict[str, Any]
    body: bytes

    @property
    def path(self) -> str:
        """The path."""
        return str(self.scope["path"])

    @property
    def model(self) -> str | None:
        """The model that it names, in its path or its body; None if it names none."""
        if self.path.startswith(_MODEL_PATHS):
            return self.path.removeprefix(_MODEL_PATHS).partition("/")[0]
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):  # whoever answers says what is wrong with it
            return None
        model = body.get("model") if isinstance(body, dict) else None
        return model if isinstance(model, str) else None


async def read(request: Request) -> AsgiRequest:
    """Read a request with its body."""
    scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
    return AsgiRequest({"type": "http", "root_path": "", **scope}, await request.body())


async def answer(app: ASGIApp, request: AsgiRequest) -> AsyncIterator[Message]:
    """The messages with which an app answers a request, as they come.

    When the iterator is closed early, as for a client that went away, the app's work is cancelled.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    body: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        return await asyncio.Future()  # the client stays until the work is cancelled

    working = asyncio.ensure_future(app({**request.scope}, receive, messages.put))
    working.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            yield message
            if message["type"] == "http.response.body" and not message.get("more_body"):
                return
        working.result()
    finally:
        working.cancel()
