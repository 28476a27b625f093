"""The access log: a line for each request when its answer has ended; of what was asked, the path alone."""

from __future__ import annotations

import logging
import time
from datetime import datetime
from typing import TextIO
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gralora_fx.errors import first_line

_SAFE = "/%:@!$&'()*+,;=~[]"  # what a path holds beside letters; all else is written as %XX, so a line stays a line
_MOST = 1000  # characters of a path
_CLIENT_GONE = 499  # nginx's status
_logger = logging.getLogger("uvicorn.error")


class AccessLogMiddleware:
    """Writes a line for each request: the common log format, and behind it the seconds until the end of the answer.

    Queries, headers and bodies are left out, since they may hold prompts and keys.
    """

    def __init__(self, app: ASGIApp, file: TextIO) -> None:
        """Wrap an app.

        Args:
            app: The app.
            file: Where to write.
        """
        self._app, self._file, self._has_failed = app, file, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and write its line when its answer has ended, however it ends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, started = datetime.now().astimezone(), time.perf_counter()
        status, size = _CLIENT_GONE, 0

        async def watched(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and scope["method"] != "HEAD":
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500 if status == _CLIENT_GONE else status  # the server answers it outside of every middleware
            raise
        finally:
            self._write(f"{_request(scope, began)} {status} {size} {time.perf_counter() - started:.3f}\n")

    def _write(self, line: str) -> None:
        """Write a line; requests are answered, too, when nobody reads it or the disk is full."""
        if self._has_failed:
            return
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self._has_failed = True
            _logger.error("requests are not logged any more: %s", first_line(error))  # noqa: TRY400 the line says all


def _request(scope: Scope, began: datetime) -> str:
    """Who asked, when, and for what."""
    client = quote((scope.get("client") or ("-",))[0], safe=":.-[]")
    path = quote(scope.get("raw_path") or scope["path"].encode(), safe=_SAFE)
    shortened = path if len(path) <= _MOST else f"{path[:_MOST]}..."
    asked = f"{quote(scope['method'])} {shortened} HTTP/{scope.get('http_version', '1.1')}"
    return f'{client} - - [{began:%d/%b/%Y:%H:%M:%S %z}] "{asked}"'
