"""What the service says of itself: that it lives, that it is ready, and what is served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from gralora_fx.config.service_settings import ServiceSettings
from gralora_fx.serving.http.engines import Engine

_NO_LIMIT = 2**31  # tokenizers without a limit say 10^30


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
        is_ready_now = await is_ready()
        return JSONResponse({"ready": is_ready_now}, 200 if is_ready_now else 503)

    return router


@dataclass(frozen=True)
class ServiceInfo:
    """What a service serves.

    Attributes:
        model: The name of the model without an adapter.
        task: The task that it was exported for; None if there was none.
        precision: Precision of the weights that are not quantized.
        quantization: How matrices are quantized; None if they are not.
        adapters_mode: How the export holds adapters.
        context_length: Tokens of a text that an encoder reads, or of a decoder's prompt and its answer; None for no
            limit, or if it takes no texts.
        chat_template: Whether it takes chats: it answers texts, and its tokenizer has a template for them.
        max_queue: The most requests, or rows, that wait.
        version: The version of gralora-fx.
    """

    model: str
    task: str | None
    precision: str
    quantization: str | None
    adapters_mode: str
    context_length: int | None
    chat_template: bool
    max_queue: int
    version: str

    def labels(self) -> dict[str, str]:
        """The facts that metrics are labelled with."""
        return {
            "base": self.model,
            "task": self.task or "none",
            "adapters_mode": self.adapters_mode,
            "precision": self.precision,
            "quantization": self.quantization or "none",
            "version": self.version,
        }


def service_info(settings: ServiceSettings, engine: Engine) -> ServiceInfo:
    """What a service serves.

    Args:
        settings: Its settings.
        engine: What it opened.
    """
    manifest, context = engine.manifest, engine.context_length
    return ServiceInfo(
        model=engine.models.base,
        task=manifest.task,
        precision=manifest.precision,
        quantization=None if manifest.quantization is None else manifest.quantization.kind,
        adapters_mode=manifest.adapters_mode,
        context_length=context if context is not None and context < _NO_LIMIT else None,
        chat_template=engine.takes_chats,
        max_queue=settings.max_queue,
        version=version("gralora-fx"),
    )


def info_routes(info: ServiceInfo) -> APIRouter:
    """The route of the facts."""
    router = APIRouter()

    @router.get("/info")
    async def facts() -> ServiceInfo:
        return info

    return router
