"""Pages of other origins: what a browser has to be told before it lets them ask this service, and read its answers."""

from __future__ import annotations

from collections.abc import Collection

from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gralora_fx.service.error_responses import FAILED, error_response
from gralora_fx.service.protocols.inference.requests import HEADER_LENGTH
from gralora_fx.service.protocols.openai.strict_model import IGNORED

ANY = "*"
_METHODS = "GET, HEAD, POST"
_AGE = "600"  # seconds for which a browser need not ask again
# headers of answers that scripts may read, beside those that they always may
_EXPOSED = ", ".join((IGNORED, HEADER_LENGTH, "Retry-After", "X-Should-Retry"))


class CorsMiddleware:
    """Tells browsers that pages of some origins may use the service; pages of others get no header of it.

    It stands before all else that a request passes: a browser's question whether it may ask has no key, and errors of
    whatever is behind it are to be read, too. Credentials of the browser, as cookies, are not allowed; the key is a
    header of the request.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        """Wrap an app."""
        self._app, self._origins, self._is_open = app, frozenset(origins), ANY in origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a browser's question, or pass a request on."""
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
        except Exception:  # which the framework logs, and would answer outside of every middleware
            if not has_begun:
                await error_response(scope["path"], 500, FAILED)(scope, receive, allowing)
            raise

    def _describe(self, headers: MutableHeaders, origin: str | None) -> None:
        """Add what a browser reads to the headers of an answer."""
        if not self._is_open:
            headers.add_vary_header("Origin")  # a cache must not give one origin the answer to another
        if origin is not None:
            headers["Access-Control-Allow-Origin"] = ANY if self._is_open else origin
            headers["Access-Control-Expose-Headers"] = _EXPOSED


def _permission(asked: Headers) -> Response:
    """The answer to the question whether a page may make a request: any with a method and headers that there are."""
    headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": _AGE}
    if (names := asked.get("access-control-request-headers")) is not None:
        headers["Access-Control-Allow-Headers"] = names
    return Response(status_code=204, headers=headers)
