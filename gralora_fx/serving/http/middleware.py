"""What every request passes: the API key, and counting."""

from __future__ import annotations

import secrets
from contextlib import nullcontext

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gralora_fx.serving.http.failures import error_response
from gralora_fx.serving.http.metrics import Metrics
from gralora_fx.serving.http.page_routes import PAGE_PATHS
from gralora_fx.serving.http.rejections import rejection

# for probes, which have no key, and for the page, which asks for it
OPEN_PATHS = ("/health", "/v2/health/live", "/v2/health/ready", *PAGE_PATHS)
_METRICS = "/metrics"
_COUNTED = "gralora_fx.counted"


def mark_counted(scope: Scope) -> None:
    """Say that a request was counted by another process, which answered it."""
    scope[_COUNTED] = True


class ApiKeyMiddleware:
    """Refuses requests without the key, apart from those for the service's health and for the page."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        """Wrap an app.

        Args:
            app: The app.
            api_key: The key, which requests give as `Authorization: Bearer`.
        """
        self._app, self._expected = app, f"bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            scheme, space, key = given.partition(b" ")  # the scheme's letters may be of either case, the key's not
            if not secrets.compare_digest(scheme.lower() + space + key, self._expected):
                message = "the API key is missing or wrong; give it as Authorization: Bearer KEY"
                response = error_response(scope["path"], 401, message, headers={"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class CountingMiddleware:
    """Counts requests by the route that answered them, so that labels are bounded."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap an app.

        Args:
            app: The app.
            metrics: Where to count.
        """
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it when its answer begins."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        status: int | None = None

        def count(code: int) -> None:
            if _COUNTED in scope:
                return
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(route, scope["method"], code)
            if (reason := rejection(scope, code)) is not None:
                self._metrics.rejected(reason, scope["method"])

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                count(message["status"])
            await send(message)

        is_scrape = scope["path"] == _METRICS  # which would count itself whenever anybody looks
        try:
            with nullcontext() if is_scrape else self._metrics.in_flight():
                await self._app(scope, receive, counted)
        except Exception:
            if status is None:  # starlette answers it outside of every middleware
                count(500)
            raise
