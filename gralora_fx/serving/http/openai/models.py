"""`/v1/models`, and `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` in vLLM's form."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.exceptions import HTTPException
from fastapi.responses import PlainTextResponse

from gralora_fx.errors import GraloraError
from gralora_fx.serving.http.adapter_loads import load_adapter
from gralora_fx.serving.http.adapter_root import AdapterRoot
from gralora_fx.serving.http.engines import Engine
from gralora_fx.serving.http.metrics import Metrics
from gralora_fx.serving.http.openai.strict_model import StrictModel
from gralora_fx.serving.scheduling.served_models import ServedModels


def model_routes(served: ServedModels) -> APIRouter:
    """The routes of the list of models."""
    router = APIRouter()
    created = int(time.time())

    def described(name: str) -> dict[str, Any]:
        parent = None if name == served.base else served.base
        return {"id": name, "object": "model", "created": created, "owned_by": "gralora-fx", "parent": parent}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in (served.base, *served.adapters)]}

    @router.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        served.check(name)
        return described(name)

    return router


class LoadRequest(StrictModel):
    """A request to load an adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(StrictModel):
    """A request to unload an adapter."""

    lora_name: str


def adapter_routes(engine: Engine, onnx_dir: Path, root: AdapterRoot | None, metrics: Metrics) -> APIRouter:
    """The routes that change adapters.

    Args:
        engine: What runs with the adapters.
        onnx_dir: The export.
        root: Where adapters may be; None if none may be loaded.
        metrics: Where to count.
    """
    router, models = APIRouter(), engine.models

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load(asked: LoadRequest) -> PlainTextResponse:
        adapters = _needed(root)

        def copied(folder: Path) -> Path:
            return adapters.copy(asked.lora_path, asked.lora_name, onnx_dir, folder)

        try:
            await _changed(
                models, lambda: load_adapter(engine, asked.lora_name, copied, may_replace=asked.load_inplace)
            )
        except GraloraError:
            metrics.adapter_load("refused")
            raise
        metrics.adapter_load("ok")
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload(asked: UnloadRequest) -> PlainTextResponse:
        _needed(root)
        await _changed(models, lambda: models.unload(asked.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return router


def _needed(root: AdapterRoot | None) -> AdapterRoot:
    if root is None:
        raise HTTPException(404, "the service was started without --adapter-root, so its adapters stay as they are")
    return root


async def _changed(models: ServedModels, work: Callable[[], None]) -> None:
    """Wait for a change of adapters, which goes on if the client goes away."""
    await asyncio.shield(asyncio.wrap_future(models.change(work)))
