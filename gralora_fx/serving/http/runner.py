"""The service on uvicorn: its socket, its signals and the limits of its connections."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import TextIO

import uvicorn
from starlette.types import ASGIApp

from gralora_fx.errors import ServingError, first_line
from gralora_fx.serving.http.access_log import AccessLogMiddleware
from gralora_fx.serving.http.connections import ConnectionLimits, limited

_SWITCH = 0.0005  # seconds that a thread may hold the interpreter while another waits, a tenth of the default
_logger = logging.getLogger("uvicorn.error")


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets on an address, which take connections once the service runs.

    Args:
        host: A name or an address; a name may have several addresses.
        port: The port; 0 for a free one.

    Raises:
        ServingError: The address is in use, or is not one of this machine.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            bound = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(bound)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind((address[0], port, *address[2:]))
            port = bound.getsockname()[1]  # the same for every address of the name
    except (OSError, UnicodeError) as error:
        for bound in sockets:
            bound.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ServingError(
                f"port {port} of {host} is in use; give another by --port, or 0 for a free one"
            ) from error
        raise ServingError(f"cannot listen on port {port} of {host} ({first_line(error)}); give another") from error
    return sockets


def run(
    app: ASGIApp, sockets: Sequence[socket.socket], limits: ConnectionLimits, access_log: TextIO | None = None
) -> None:
    """Serve until the process is told to end.

    The first SIGTERM or SIGINT lets the requests that run end, and takes no more; a second one ends the process at
    once, with the shell's status for the signal.

    Args:
        app: The service.
        sockets: Where to listen, from `bind`.
        limits: Limits of connections.
        access_log: Where requests are logged; None for nowhere.
    """
    # the thread that runs batches must not wait for the one that reads requests, or processors would idle
    sys.setswitchinterval(_SWITCH)
    log: Callable[[ASGIApp], ASGIApp] | None = None
    if access_log is not None:
        log = partial(AccessLogMiddleware, file=access_log)
        app = log(app)
    config = uvicorn.Config(app, http=limited(limits, log), ws="none", log_level="info", access_log=False)
    _Server(config, sockets).run(sockets=list(sockets))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, sockets: Sequence[socket.socket]) -> None:
        super().__init__(config)
        self._sockets = sockets

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in self._sockets:
            host, port = bound.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            _logger.info("running on http://%s:%d", shown, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            _logger.warning("%s again: ended at once, requests that ran are lost", signal.Signals(sig).name)
            logging.shutdown()
            os._exit(128 + sig)  # whatever threads do
        super().handle_exit(sig, frame)
