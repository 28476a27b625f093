"""`/v1/models`, and `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` in vLLM's form."""

from __future__ import annotations

import time
from typing import Any, Protocol

from fastapi import APIRouter
from fastapi.exceptions import HTTPException
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool

from gralora_fx.errors import GraloraError
from gralora_fx.service.adapter_store.store import AdapterStore
from gralora_fx.service.error_responses import status_of
from gralora_fx.service.metrics import Metrics
from gralora_fx.service.protocols.openai.strict_model import StrictModel


def model_routes(served: AdapterStore) -> APIRouter:
    """Return the routes that list models."""
    router = APIRouter()
    created = int(time.time())

    def described(name: str) -> dict[str, Any]:
        is_base = name == served.base
        head = {"id": name, "object": "model", "created": created, "owned_by": "gralora-fx"}
        return {**head, "parent": None if is_base else served.base, "loaded": is_base or name in served.adapters}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = await run_in_threadpool(lambda: served.available)  # which may read a directory
        return {"object": "list", "data": [described(name) for name in (served.base, *names)]}

    @router.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        served.check(name)
        return described(name)

    return router


class LoadRequest(StrictModel):
    """A request to load an adapter from a path in the adapter root.

    `load_inplace`: it may replace an adapter of the same name. `pin`: it stays in memory until unloaded, instead of
    being evicted when others need room.
    """

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    pin: bool = True


class UnloadRequest(StrictModel):
    """A request to unload an adapter."""

    lora_name: str


class AdapterChanges(Protocol):
    """Changes of adapters by requests: of one `AdapterStore`, or of the one in each replica."""

    async def load(self, name: str, path: str, *, may_replace: bool, pin: bool) -> None:
        """Load the adapter at a path of the root under a name."""

    async def evict(self, name: str) -> None:
        """Unload an adapter and hide its name."""


def adapter_routes(changes: AdapterChanges | None, metrics: Metrics) -> APIRouter:
    """Return the routes that load and unload adapters."""
    router = APIRouter()

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load(asked: LoadRequest) -> PlainTextResponse:
        needed = _needed(changes)
        try:
            await needed.load(asked.lora_name, asked.lora_path, may_replace=asked.load_inplace, pin=asked.pin)
        except GraloraError as error:
            metrics.adapter_load("refused")
            if status_of(error) in (400, 404):  # errors of the file, unless they name another field
                error.field = error.field or "lora_path"
            raise
        metrics.adapter_load("ok")
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload(asked: UnloadRequest) -> PlainTextResponse:
        await _needed(changes).evict(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return router


def _needed(changes: AdapterChanges | None) -> AdapterChanges:
    if changes is None:
        raise HTTPException(404, "the service was started without --adapter-root, so its adapters stay as they are")
    return changes
