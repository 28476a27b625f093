"""`/info`: what is served, as a person or a dashboard asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from fastapi import APIRouter

from gralora_fx.errors import ServingError
from gralora_fx.runtime.manifest import read_manifest
from gralora_fx.serving.http.engines import EncoderEngine, TextEngine
from gralora_fx.serving.http.settings import ServiceSettings

_NO_LIMIT = 2**31  # tokenizers without a limit say 10^30


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


def service_info(settings: ServiceSettings, engine: TextEngine | EncoderEngine) -> ServiceInfo:
    """What a service serves.

    Args:
        settings: Its settings.
        engine: What it opened.
    """
    manifest = read_manifest(settings.directory, ServingError)
    context: int | None
    if isinstance(engine, TextEngine):
        context = engine.queue.limits.context if engine.inputs is None else engine.inputs.limit
        has_template = engine.takes_text and bool(getattr(engine.tokenizer, "chat_template", None))
    else:
        context = engine.encoder.reader.limit if engine.encoder.takes_texts else None
        has_template = False
    return ServiceInfo(
        model=engine.names.base,
        task=manifest.task,
        precision=manifest.precision,
        quantization=None if manifest.quantization is None else manifest.quantization.kind,
        adapters_mode=manifest.adapters_mode,
        context_length=context if context is not None and context < _NO_LIMIT else None,
        chat_template=has_template,
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
