"""Middleware of every request: access log, CORS, counting, API key, and reading the body."""

from __future__ import annotations

import logging
import secrets
import time
import zlib
from collections.abc import Collection
from contextlib import nullcontext
from datetime import datetime
from typing import TextIO
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import first_line, shown
from gralora_fx.service.error_responses import FAILED, error_response
from gralora_fx.service.metrics import Metrics
from gralora_fx.service.protocols.inference.requests import HEADER_LENGTH
from gralora_fx.service.protocols.openai.strict_model import IGNORED
from gralora_fx.service.service_routes import OPEN_PATHS

ANY = "*"
_METHODS = "GET, HEAD, POST"
_AGE = "600"  # seconds for which a browser may cache the permission
# headers of answers that scripts may read, beside those that they always may
_EXPOSED = ", ".join((IGNORED, HEADER_LENGTH, "Retry-After", "X-Should-Retry"))
_SAFE = "/%:@!$&'()*+,;=~[]"  # characters of a path kept in a log line; others are written as %XX
_MOST = 1000  # characters of a path
_CLIENT_GONE = 499  # nginx's status
_logger = logging.getLogger("uvicorn.error")
_METRICS = "/metrics"
_WINDOW_BITS = {"gzip": zlib.MAX_WBITS + 16, "x-gzip": zlib.MAX_WBITS + 16, "deflate": zlib.MAX_WBITS}  # of zlib


class CorsMiddleware:
    """Allows pages of some origins to use the service (CORS); responses to other origins carry no CORS header.

    It is outermost: a preflight request has no key, and errors of inner middleware must be readable too. Browser
    credentials, such as cookies, are not allowed; the API key is a request header.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        """Wrap an ASGI app."""
        self._app, self._origins, self._is_open = app, frozenset(origins), ANY in origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight request, or pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin, has_begun = headers.get("origin"), False
        is_allowed = origin is not None and (self._is_open or origin in self._origins)

        async def allowing(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._describe(MutableHeaders(scope=message), origin if is_allowed else None)
            await send(message)

        if is_allowed and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _permission(headers)(scope, receive, allowing)
            return
        try:
            await self._app(scope, receive, allowing)
        except Exception:  # the framework logs it, and would answer outside of every middleware
            if not has_begun:
                await error_response(scope["path"], 500, FAILED)(scope, receive, allowing)
            raise

    def _describe(self, headers: MutableHeaders, origin: str | None) -> None:
        """Add CORS headers to a response."""
        if not self._is_open:
            headers.add_vary_header("Origin")  # a cache must not give one origin the answer to another
        if origin is not None:
            headers["Access-Control-Allow-Origin"] = ANY if self._is_open else origin
            headers["Access-Control-Expose-Headers"] = _EXPOSED


def _permission(asked: Headers) -> Response:
    """Return the response to a preflight request: any method and header of the service is allowed."""
    headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": _AGE}
    if (names := asked.get("access-control-request-headers")) is not None:
        headers["Access-Control-Allow-Headers"] = names
    return Response(status_code=204, headers=headers)


class AccessLogMiddleware:
    """Writes a line per request: the common log format, then the seconds until the end of the response.

    Queries, headers and bodies are left out, since they may hold prompts and keys.
    """

    def __init__(self, app: ASGIApp, file: TextIO) -> None:
        """Wrap an ASGI app."""
        self._app, self._file, self._has_failed = app, file, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and write its line when the response has ended, however it ends."""
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
        """Write a line; a full disk or closed pipe does not fail requests."""
        if self._has_failed:
            return
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self._has_failed = True
            _logger.error("requests are not logged any more: %s", first_line(error))  # noqa: TRY400 the line says all


def _request(scope: Scope, began: datetime) -> str:
    """Return the client, time and request line for the access log."""
    client = quote((scope.get("client") or ("-",))[0], safe=":.-[]")
    path = quote(scope.get("raw_path") or scope["path"].encode(), safe=_SAFE)
    shortened = path if len(path) <= _MOST else f"{path[:_MOST]}..."
    asked = f"{quote(scope['method'])} {shortened} HTTP/{scope.get('http_version', '1.1')}"
    return f'{client} - - [{began:%d/%b/%Y:%H:%M:%S %z}] "{asked}"'


def add_middleware(app: FastAPI, settings: ServiceSettings, metrics: Metrics) -> None:
    """Add the middleware; requests pass CORS, counting, the API key and body reading, in this order."""
    app.add_middleware(BodyMiddleware, max_body=settings.max_body)
    if settings.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=settings.api_key)
    app.add_middleware(CountingMiddleware, metrics=metrics)
    if settings.allow_origin:
        app.add_middleware(CorsMiddleware, origins=settings.allow_origin)


class ApiKeyMiddleware:
    """Refuses requests without the API key, except those for health and for the page."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        """Wrap an ASGI app."""
        self._app, self._expected = app, f"bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            authorization = Headers(scope=scope).get("authorization", "").encode("latin-1")
            # the scheme is case-insensitive, the key is not
            scheme, space, key = authorization.partition(b" ")
            if not secrets.compare_digest(scheme.lower() + space + key, self._expected):
                message = "the API key is missing or wrong; give it as Authorization: Bearer KEY"
                response = error_response(scope["path"], 401, message, headers={"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class CountingMiddleware:
    """Counts requests by the route that answered them, which bounds the labels."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap an ASGI app."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it when its response begins."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(scope, message["status"])
            await send(message)

        is_scrape = scope["path"] == _METRICS  # a scrape would count itself
        try:
            with nullcontext() if is_scrape else self._metrics.in_flight():
                await self._app(scope, receive, counted)
        except Exception:
            self._metrics.answered(scope, 500)  # starlette answers it outside of every middleware
            raise


class _Refused(Exception):
    """A body is refused."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BodyMiddleware:
    """Reads every request's body, and refuses those over a limit, before or after decompression."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        """Wrap an ASGI app; the limit also applies to decompressed bodies."""
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
        """Return a body decompressed; `window_bits` is zlib's."""
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
    """Return zlib's `wbits` for the body's Content-Encoding; None for an uncompressed body."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding not in _WINDOW_BITS:
        raise _Refused(415, f"Content-Encoding {shown(encoding)} is not taken; use gzip or deflate, or none")
    return _WINDOW_BITS[encoding]


def _describe(scope: Scope, length: int) -> None:
    """Replace a request's headers with those of its decompressed body."""
    headers = MutableHeaders(raw=[pair for pair in scope["headers"] if pair[0] != b"content-encoding"])
    headers["Content-Length"] = str(length)
    scope["headers"] = headers.raw


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body as one message, then the server's messages."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
