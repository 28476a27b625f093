"""The pages for browsers and their files: `/`, which tries the model, and `/docs`, Swagger UI of the API.

They are plain HTML, CSS and JavaScript that the other routes answer; Swagger UI's own files come from a package.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

_FOLDER = Path(__file__).parent
_SWAGGER = Path(str(files("fastapi_swagger"))) / "resources"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_ADDRESSES = {"index.html": "/", "docs.html": "/docs"}  # other files are at /page/
_FILES = {
    _ADDRESSES.get(path.name, f"/page/{path.name}"): path
    for path in sorted([*_FOLDER.iterdir(), _SWAGGER / "swagger-ui-bundle.js", _SWAGGER / "swagger-ui.css"])
    if path.suffix in _TYPES
}
PAGE_PATHS = tuple(_FILES)  # open without a key: they are the same for everybody
_HEADERS = {
    # nothing from elsewhere (Swagger UI's icons are in its CSS), no script in a page, no other site may frame one
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """The routes of the pages."""
    router = APIRouter(include_in_schema=False)

    def add(path: str, file: Path) -> None:
        async def send() -> Response:
            return FileResponse(file, media_type=_TYPES[file.suffix], headers=_HEADERS)

        router.add_api_route(path, send, methods=["GET", "HEAD"])

    for path, file in _FILES.items():
        add(path, file)
    return router
