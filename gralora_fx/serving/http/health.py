"""The routes that say whether the service lives and is ready."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse


def health_routes(is_ready: Callable[[], Awaitable[bool]]) -> APIRouter:
    """The routes, which need no key.

    Args:
        is_ready: Tells whether requests are answered now.
    """
    router = APIRouter()

    @router.get("/v2/health/live")
    async def live() -> dict[str, Any]:
        return {"live": True}

    @router.get("/health")
    @router.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        found = await is_ready()
        return JSONResponse({"ready": found}, 200 if found else 503)

    return router
