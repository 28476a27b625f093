"""`/v1/models`: the base and its adapters."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from gralora_fx.serving.http.model_names import ModelNames


def model_routes(names: ModelNames) -> APIRouter:
    """The routes of the list of models."""
    router = APIRouter()
    created = int(time.time())

    def described(name: str) -> dict[str, Any]:
        parent = None if name == names.base else names.base
        return {"id": name, "object": "model", "created": created, "owned_by": "gralora-fx", "parent": parent}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in (names.base, *names.adapters)]}

    @router.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        names.adapter(name)
        return described(name)

    return router
