"""The access log: one line for each request, whatever ends it, and nothing of what was said."""

from __future__ import annotations

import io
import logging
import re
import socket
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from running_service import serving
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ConnectionLimits, ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app
from gralora_fx.service.middleware import AccessLogMiddleware

LINE = re.compile(r'(\S+) - - \[([^\]]+)\] "(\S+) (\S+) HTTP/([\d.]+)" (\d+) (\d+) (\d+\.\d{3})')


def fields(line: str) -> tuple[str, ...]:
    """Client, time, method, path, version of HTTP, status, size and seconds."""
    found = LINE.fullmatch(line)
    assert found, line
    datetime.strptime(found[2], "%d/%b/%Y:%H:%M:%S %z")
    return found.groups()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def client(tmp_path: Path, log: io.StringIO) -> Iterator[TestClient]:
    export_onnx(trace(torch.nn.Linear(4, 2), (torch.randn(2, 4),)), tmp_path / "net", verify=False)
    app = create_app(ServiceSettings(tmp_path / "net", api_key="secret"))
    with TestClient(AccessLogMiddleware(app, log)) as client:
        yield client


def test_what_a_line_says(client: TestClient, log: io.StringIO) -> None:
    tensor = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1234.5, 0, 0, 0]}
    headers = {"Authorization": "Bearer secret"}
    answer = client.post("/v2/models/net/infer?token=hidden", json={"inputs": [tensor]}, headers=headers)
    assert answer.status_code == 200
    assert client.get("/v1/models", headers={"Authorization": "Bearer wrong-key"}).status_code == 401
    assert client.head("/").status_code == 200
    assert client.post("/v1/completions", content=b"{", headers=headers).status_code == 404
    lines = [fields(line) for line in log.getvalue().splitlines()]
    assert [line[2:4] + line[5:6] for line in lines] == [
        ("POST", "/v2/models/net/infer", "200"),
        ("GET", "/v1/models", "401"),
        ("HEAD", "/", "200"),
        ("POST", "/v1/completions", "404"),
    ]
    assert [int(line[6]) for line in lines][::2] == [len(answer.content), 0]
    assert lines[0][0] == "testclient"
    for hidden in ("secret", "wrong-key", "hidden", "1234", "token"):
        assert hidden not in log.getvalue()


@pytest.mark.parametrize("path", ["/a%0ab", '/a"b', "/%22", "/ü", "/%ED%A0%80", "/a b", "/" + "x" * 5000, "/%00"])
def test_a_line_stays_a_line(log: io.StringIO, path: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    TestClient(AccessLogMiddleware(app, log)).get(path)
    (line,) = log.getvalue().splitlines()
    assert len(line) < 1200
    assert fields(line)[5:7] == ("200", "2")
    assert line.isascii()
    assert line.count('"') == 2


def test_the_path_is_logged_as_it_was_sent(log: io.StringIO) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    TestClient(AccessLogMiddleware(app, log)).get("/v2/models/a%2Fb/x@1,2;c")
    assert fields(log.getvalue().strip())[3] == "/v2/models/a%2Fb/x@1,2;c"


def test_how_requests_end(log: io.StringIO) -> None:
    """A stream is measured to its end; one that breaks keeps what was sent; no answer is 499, and a crash 500."""

    async def parts(count: int) -> Any:
        for _ in range(count):
            yield b"12345"
        if count == 2:
            raise ValueError

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/gone":
            return
        if scope["path"] == "/crash":
            raise ValueError
        await StreamingResponse(parts(3 if scope["path"] == "/whole" else 2))(scope, receive, send)

    client = TestClient(AccessLogMiddleware(app, log), raise_server_exceptions=False)
    for path in ("/whole", "/broken", "/crash", "/gone"):
        client.get(path)
    found = [fields(line) for line in log.getvalue().splitlines()]
    assert [(line[3], line[5], line[6]) for line in found] == [
        ("/whole", "200", "15"),
        ("/broken", "200", "10"),
        ("/crash", "500", "0"),
        ("/gone", "499", "0"),
    ]


def test_connections_that_are_too_many_are_logged(log: io.StringIO) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await PlainTextResponse("ok")(scope, receive, send)

    wrapped = partial(AccessLogMiddleware, file=log)
    with (
        serving(wrapped(app), ConnectionLimits(connections=1), wrapped) as address,
        socket.create_connection(address, 20) as first,
        socket.create_connection(address, 20) as second,
    ):
        first.sendall(b"GET /first HTTP/1.1\r\nHost: x\r\n\r\n")
        second.sendall(b"GET /second HTTP/1.1\r\nHost: x\r\n\r\n")
        answers = first.recv(100), second.recv(100)
    statuses = sorted(answer.split()[1] for answer in answers)
    assert b"503" in statuses
    found = [fields(line) for line in log.getvalue().splitlines()]
    assert sorted(line[3] for line in found) == ["/first", "/second"]
    assert sorted(line[5].encode() for line in found) == statuses
    assert {line[0] for line in found} == {"127.0.0.1"}


def test_a_log_that_nobody_reads_ends_no_request(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("uvicorn"), "handlers", [caplog.handler])  # it passes nothing on, later on
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", False)

    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    client = TestClient(AccessLogMiddleware(app, Closed()))
    assert [client.get("/").status_code for _ in range(3)] == [200] * 3
    assert [record.getMessage() for record in caplog.records if "logged" in record.getMessage()] == [
        "requests are not logged any more: [Errno 32] Broken pipe"
    ]
