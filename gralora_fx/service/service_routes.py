"""Routes of every service: liveness, readiness, facts, and pages for browsers.

The pages are `/`, which tries the model, and `/docs`, Swagger UI of the API: plain HTML, CSS and JavaScript that use
the other routes; Swagger UI's own files come from a package.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse, Response

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.service.engines import Engine

_NO_LIMIT = 2**31  # tokenizers without a limit have 10^30
_PAGES = Path(__file__).parent / "page"
_SWAGGER = Path(str(files("fastapi_swagger"))) / "resources"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_ADDRESSES = {"index.html": "/", "docs.html": "/docs"}  # other files are at /page/
_FILES = {
    _ADDRESSES.get(path.name, f"/page/{path.name}"): path
    for path in sorted([*_PAGES.iterdir(), _SWAGGER / "swagger-ui-bundle.js", _SWAGGER / "swagger-ui.css"])
    if path.suffix in _TYPES
}
PAGE_PATHS = tuple(_FILES)
# open without a key: for probes, which have none, and for the pages, which ask for it and are the same for everybody
OPEN_PATHS = ("/health", "/v2/health/live", "/v2/health/ready", *PAGE_PATHS)
_HEADERS = {
    # no resources of other origins (Swagger UI's icons are in its CSS), no inline scripts, no framing by other sites
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def health_routes(is_ready: Callable[[], Awaitable[bool]]) -> APIRouter:
    """Return the health routes, which need no key."""
    router = APIRouter()

    @router.head("/v2/health/live", include_in_schema=False)  # used by some load balancers
    @router.get("/v2/health/live")
    async def live() -> dict[str, Any]:
        return {"live": True}

    @router.head("/health", include_in_schema=False)
    @router.head("/v2/health/ready", include_in_schema=False)
    @router.get("/health")
    @router.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        is_ready_now = await is_ready()
        return JSONResponse({"ready": is_ready_now}, 200 if is_ready_now else 503)

    return router


@dataclass(frozen=True)
class ServiceInfo:
    """Facts of a service."""

    model: str  # the name of the model without an adapter
    task: str | None  # the task that it was exported for; None if there was none
    precision: str  # precision of the weights that are not quantized
    quantization: str | None  # how matrices are quantized; None if they are not
    adapters_mode: str  # how the export holds adapters
    # tokens of a text that an encoder reads, or of a decoder's prompt and answer; None for no limit, or if it takes no
    # texts
    context_length: int | None
    chat_template: bool  # whether it takes chats: it answers texts, and its tokenizer has a chat template
    attachments: tuple[str, ...]  # types of parts of a chat's messages that it reads beside text, by OpenAI's names
    max_queue: int  # maximum number of waiting requests or rows
    version: str  # the version of gralora-fx

    def labels(self) -> dict[str, str]:
        """Return the facts that label metrics."""
        return {
            "base": self.model,
            "task": self.task or "none",
            "adapters_mode": self.adapters_mode,
            "precision": self.precision,
            "quantization": self.quantization or "none",
            "version": self.version,
        }


def service_info(settings: ServiceSettings, engine: Engine) -> ServiceInfo:
    """Return the facts of a service."""
    manifest, context = engine.manifest, engine.context_length
    return ServiceInfo(
        model=engine.models.base,
        task=manifest.task,
        precision=manifest.precision,
        quantization=None if manifest.quantization is None else manifest.quantization.kind,
        adapters_mode=manifest.adapters_mode,
        context_length=context if context is not None and context < _NO_LIMIT else None,
        chat_template=engine.takes_chats,
        attachments=engine.attached,
        max_queue=settings.max_queue,
        version=version("gralora-fx"),
    )


def info_routes(info: ServiceInfo) -> APIRouter:
    """Return the route of the facts."""
    router = APIRouter()

    @router.get("/info")
    async def facts() -> ServiceInfo:
        return info

    return router


def page_routes() -> APIRouter:
    """Return the routes of the pages."""
    router = APIRouter(include_in_schema=False)

    def add(path: str, file: Path) -> None:
        async def send() -> Response:
            return FileResponse(file, media_type=_TYPES[file.suffix], headers=_HEADERS)

        router.add_api_route(path, send, methods=["GET", "HEAD"])

    for path, file in _FILES.items():
        add(path, file)
    return router
