"""The bodies of requests: bounded in size, decompressed, and read before anything works on them."""

from __future__ import annotations

import zlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gralora_fx.errors import shown
from gralora_fx.serving.http.failures import error_response

_WINDOW_BITS = {"gzip": zlib.MAX_WBITS + 16, "x-gzip": zlib.MAX_WBITS + 16, "deflate": zlib.MAX_WBITS}  # of zlib


class _Refused(Exception):
    """A body is not taken."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BodyMiddleware:
    """Reads the body of every request, and refuses those over a limit, compressed or not."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        """Wrap an app.

        Args:
            app: The app.
            max_body: The most bytes of a body, also once it is decompressed.
        """
        self._app, self._max_body = app, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body as one message, or answer 400, 413 or 415."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            window_bits = _window_bits(headers)
            body = await self._read(headers, receive)
            if body is None:  # the client went away
                return
            if window_bits is not None:
                body = self._decompressed(body, window_bits)
                _describe(scope, len(body))
        except _Refused as refused:
            response = error_response(scope["path"], refused.status, str(refused))
            await response(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_body:
            raise self._too_large("is")
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                raise self._too_large("is")
            more = message.get("more_body", False)
        return b"".join(parts)

    def _decompressed(self, body: bytes, window_bits: int) -> bytes:
        """A body without its compression.

        Raises:
            _Refused: It is damaged, or larger than the limit.
        """
        stream = zlib.decompressobj(window_bits)
        try:
            result = stream.decompress(body, self._max_body)
            if not stream.unconsumed_tail:
                result += stream.flush()
            if stream.unconsumed_tail or len(result) > self._max_body:
                raise self._too_large("decompresses to")
        except zlib.error as error:
            raise _Refused(400, f"the body cannot be decompressed ({error})") from error
        if not stream.eof or stream.unused_data:
            raise _Refused(400, "the body cannot be decompressed (it does not end where its compression does)")
        return result

    def _too_large(self, verb: str) -> _Refused:
        return _Refused(
            413, f"the body {verb} more than the {self._max_body} bytes that are taken; send less at a time"
        )


def _window_bits(headers: Headers) -> int | None:
    """How zlib reads a body's compression; None for one without."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding not in _WINDOW_BITS:
        raise _Refused(415, f"Content-Encoding {shown(encoding)} is not taken; use gzip or deflate, or none")
    return _WINDOW_BITS[encoding]


def _describe(scope: Scope, length: int) -> None:
    """Give a request the headers of its decompressed body."""
    headers = MutableHeaders(raw=[pair for pair in scope["headers"] if pair[0] != b"content-encoding"])
    headers["Content-Length"] = str(length)
    scope["headers"] = headers.raw


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body as one message, and then what the server tells."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
