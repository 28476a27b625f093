"""Work for a client that may go away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response

_CLIENT_CLOSED = 499  # nginx's status; nobody reads it


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response of some work, which is cancelled if the client goes away first.

    Args:
        request: The request, whose body was read.
        work: Makes the response.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=_CLIENT_CLOSED)
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
