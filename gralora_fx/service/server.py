"""The service on uvicorn: sockets, signals, and limits on connections and request heads."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from types import FrameType
from typing import TextIO

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gralora_fx.core.config.service_settings import ConnectionLimits
from gralora_fx.errors import ServingError, first_line
from gralora_fx.service.error_responses import error_response
from gralora_fx.service.middleware import AccessLogMiddleware

_MAX_HEAD = 64 * 1024  # bytes of a request line and its headers
_SWITCH = 0.0005  # seconds that a thread may hold the interpreter while another waits, a tenth of the default
_logger = logging.getLogger("uvicorn.error")


def limited(limits: ConnectionLimits, log: Callable[[ASGIApp], ASGIApp] | None = None) -> type[asyncio.Protocol]:
    """Return a protocol class for uvicorn that enforces limits."""

    class Limited(_LimitedProtocol):
        pass

    Limited.limits, Limited.log = limits, staticmethod(log or _unlogged)
    return Limited


def _unlogged(app: ASGIApp) -> ASGIApp:
    return app


class _LimitedProtocol(HttpToolsProtocol):
    """A connection, which is closed when a request does not arrive in time.

    The clock starts with the connection and with the first byte of each further request, and stops when the request is
    complete. The rest of a refused body is timed too.
    """

    limits = ConnectionLimits()
    log: Callable[[ASGIApp], ASGIApp] = staticmethod(_unlogged)
    _timer: asyncio.TimerHandle | None = None
    _head = 0  # bytes of an incomplete head so far; -1 once it is complete
    _is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._served_app = self.app
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read data, unless a head grows too large."""
        if self._is_closed:
            return
        super().data_received(data)
        if self._head >= 0 and not self.transport.is_closing():
            self._head += len(data)
            if self._head > _MAX_HEAD:
                self._close(431, f"the head of the request has more than the {_MAX_HEAD} bytes that are taken")

    def on_message_begin(self) -> None:
        """Start the clock for a further request."""
        super().on_message_begin()
        self._head = 0
        if self._timer is None:
            self._start_clock()

    def on_headers_complete(self) -> None:
        """Choose what answers: the app, or an error for too many connections or too large a head."""
        self._head = -1
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        self.app = self._served_app
        if size > _MAX_HEAD:
            self._refuse(431, f"the head of the request has more than the {_MAX_HEAD} bytes that are taken")
        elif len(self.connections) > self.limits.connections:
            self._refuse(503, f"there are more than the {self.limits.connections} connections that are served")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().on_message_complete()
        if self.cycle.response_complete:  # answered early; uvicorn's clock for idle connections has stopped
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP."""
        self._close(400, "the request is not valid HTTP")

    def _refuse(self, status: int, message: str) -> None:
        """Answer a request whose head is complete with an error, and close the connection."""
        _logger.info("%s: %d, %s", self.client, status, message)

        async def refusal(scope: Scope, receive: Receive, send: Send) -> None:
            response = error_response(scope["path"], status, message, headers={"Connection": "close"})
            await response(scope, receive, send)

        self.app = self.log(refusal)

    def _start_clock(self) -> None:
        self._timer = self.loop.call_later(self.limits.read_timeout, self._time_out)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        if self.flow.read_paused:  # this side paused reading
            self._start_clock()
            return
        self._close(408, f"the request did not arrive within {self.limits.read_timeout:g} seconds")

    def _close(self, status: int, message: str) -> None:
        """Close the connection, with an error response if none has begun."""
        self._is_closed = True
        self._stop_clock()
        _logger.info("%s: %d, %s", self.client, status, message)
        cycle, in_head = self.cycle, self._head >= 0
        # in a head, the last cycle is that of the request before
        may_answer = (cycle is None or cycle.response_complete) if in_head else not cycle.response_started
        if may_answer and not self.pipeline:
            path = "" if in_head else self.scope["path"]
            response = error_response(path, status, message, headers={"Connection": "close"})
            lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
            lines += [b"%s: %s" % pair for pair in response.raw_headers]
            self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()


def bind(host: str, port: int) -> list[socket.socket]:
    """Return bound sockets, which accept connections once the service runs."""
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(addresses):
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

    The first SIGTERM or SIGINT lets running requests finish and refuses new ones; a second one ends the process at
    once, with the shell's status for the signal.
    """
    # otherwise the thread that runs batches waits for the one that reads requests, and cores idle
    sys.setswitchinterval(_SWITCH)
    run_torch_alone()
    log: Callable[[ASGIApp], ASGIApp] | None = None
    if access_log is not None:
        log = partial(AccessLogMiddleware, file=access_log)
        app = log(app)
    config = uvicorn.Config(app, http=limited(limits, log), ws="none", log_level="info", access_log=False)
    _Server(config, sockets).run(sockets=list(sockets))


def run_torch_alone() -> None:
    """Let torch, if a model's processor has imported it, use one thread; more would wait for each other."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


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
            try:  # the signal may have interrupted a line on stderr, into which no other can be written
                _logger.warning("%s again: ended at once, requests that ran are lost", signal.Signals(sig).name)
                logging.shutdown()
            finally:
                os._exit(128 + sig)  # even if threads are running
        super().handle_exit(sig, frame)
