"""A service that answers on a port of this machine, in a thread of the test's own process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import uvicorn

from gralora_fx.serving.http.app import create_app
from gralora_fx.serving.http.settings import ServiceSettings


@contextmanager
def running(settings: ServiceSettings) -> Iterator[tuple[str, Any]]:
    """Its address, which ends in a slash, and its app."""
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (port,) = [socket.getsockname()[1] for listening in server.servers for socket in listening.sockets]
    try:
        yield f"http://127.0.0.1:{port}/", app
    finally:
        server.should_exit = True
        thread.join(20)


def post(url: str, body: Any) -> Any:
    """What a service answers, as JSON."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        return json.load(response)
