"""The page for browsers at `/`, and its files: plain HTML, CSS and JavaScript that the other routes answer."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

_FOLDER = Path(__file__).parent / "page"
_INDEX = "index.html"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = {
    "/" if path.name == _INDEX else f"/page/{path.name}": path
    for path in sorted(_FOLDER.iterdir())
    if path.suffix in _TYPES
}
PAGE_PATHS = tuple(_FILES)  # open without a key: they are the same for everybody
_HEADERS = {
    # nothing from elsewhere, no script in the page itself, and no other site may frame it
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """The routes of the page."""
    router = APIRouter(include_in_schema=False)

    def add(path: str, file: Path) -> None:
        async def send() -> Response:
            return FileResponse(file, media_type=_TYPES[file.suffix], headers=_HEADERS)

        router.add_api_route(path, send, methods=["GET", "HEAD"])

    for path, file in _FILES.items():
        add(path, file)
    return router
