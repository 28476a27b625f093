"""A service on a port of its own, in a thread."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import uvicorn

from gralora_fx.core.config.service_settings import ConnectionLimits, ServiceSettings
from gralora_fx.service.app import create_app
from gralora_fx.service.server import bind, limited


@contextmanager
def serving(app: Any, limits: ConnectionLimits | None = None, log: Any = None) -> Iterator[tuple[str, int]]:
    """Yield the address of a service while it runs."""
    protocol = limited(limits or ConnectionLimits(), log)
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, ws="none", log_level="error"))
    sockets = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def running(settings: ServiceSettings) -> Iterator[tuple[str, Any]]:
    """Yield the URL of a service of an export, which ends in a slash, and its app."""
    app = create_app(settings)
    with serving(app) as (host, port):
        yield f"http://{host}:{port}/", app


def permitted(url: str, origin: str) -> tuple[Any, Any]:
    """Return the origins that may ask and read, as a service tells a browser before a request and after."""
    question = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    with urlopen(Request(url, headers=question, method="OPTIONS"), timeout=30) as before:
        asked = before.headers.get_all("Access-Control-Allow-Origin")
    with pytest.raises(HTTPError) as answered:
        urlopen(Request(url, b"{}", {"Origin": origin}), timeout=30)
    with answered.value as after:
        read = after.headers.get_all("Access-Control-Allow-Origin")
    return asked, read


def post(url: str, body: Any) -> Any:
    """Post to a service and return its answer, as JSON."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        return json.load(response)
