"""Clients that are slow, large or many, and bodies that are compressed, against a running service."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from running_service import serving
from starlette.testclient import TestClient

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ConnectionLimits, ServiceSettings
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app
from gralora_fx.service.server import bind

MAX_BODY = 20_000
INFER = "/v2/models/net/infer"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("limits") / "net"
    export_onnx(trace(torch.nn.Linear(4, 2), (torch.randn(2, 4),)), path, verify=False)
    return path


@pytest.fixture(scope="module")
def client(export: Path) -> Iterator[TestClient]:
    with TestClient(create_app(ServiceSettings(export, max_body=MAX_BODY))) as running:
        yield running


@pytest.fixture(scope="module")
def request_body(client: TestClient) -> bytes:
    (name,) = [value["name"] for value in client.get("/v2/models/net").json()["inputs"]]
    return json.dumps({"inputs": [{"name": name, "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()


def post(client: TestClient, content: Any, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(INFER, content=content, headers={"Content-Type": "application/json", **named})


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "x-gzip", "identity", "GZip"])
def test_compressed_bodies(client: TestClient, request_body: bytes, encoding: str) -> None:
    packed = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}
    content = packed[encoding.lower()](request_body)
    expected = post(client, request_body).raise_for_status().json()
    assert post(client, content, Content_Encoding=encoding).raise_for_status().json() == expected


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress])
def test_bombs_and_damaged_bodies(client: TestClient, request_body: bytes, compress: Any) -> None:
    encoding = "gzip" if compress is gzip.compress else "deflate"
    for size, status in ((100_000_000, 413), (MAX_BODY + 1, 413), (MAX_BODY, 400)):  # the last is not JSON
        found = post(client, compress(b"0" * size), Content_Encoding=encoding)
        assert found.status_code == status
    whole = compress(request_body)
    for content in (whole[:-1], whole + b"0", b"", b"no compression"):
        found = post(client, content, Content_Encoding=encoding)
        assert found.status_code == 400
        assert "cannot be decompressed" in found.json()["error"]
    found = post(client, request_body, Content_Encoding="br")
    assert (found.status_code, found.json()["error"]) == (
        415,
        "Content-Encoding 'br' is not taken; use gzip or deflate, or none",
    )


def test_large_bodies(client: TestClient) -> None:
    message = f"the body is more than the {MAX_BODY} bytes that are taken; send less at a time"
    for content in (b"0" * (MAX_BODY + 1), iter([b"0" * 1000] * 21)):  # the second in chunks, without a length
        found = post(client, content)
        assert (found.status_code, found.json()) == (413, {"error": message})
    assert client.post("/v1/embeddings", content=b"0" * (MAX_BODY + 1)).json()["error"]["code"] == 413
    assert post(client, b"0" * MAX_BODY).status_code == 400


def said(connection: socket.socket) -> tuple[int, str]:
    """Return the status and the error of what a service answers before it ends a connection."""
    connection.settimeout(20)
    found = b""
    while part := connection.recv(65536):
        found += part
    head, _, body = found.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    error = json.loads(body)["error"]
    return int(head.split()[1]), error if isinstance(error, str) else error["message"]


def keep_sending(connection: socket.socket) -> None:
    """Send parts of a body that is small and never ends."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        connection.sendall(b"1\r\n0\r\n")
        time.sleep(0.05)


HEAD = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()


def test_connections(export: Path, request_body: bytes) -> None:
    limits = ConnectionLimits(connections=3, read_timeout=0.6)
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(request_body) + request_body
    app = create_app(ServiceSettings(export, max_body=MAX_BODY))
    with serving(app, limits) as address:

        def connected(data: bytes) -> Any:
            connection = socket.create_connection(address)
            connection.sendall(data)
            return closing(connection)

        late = (408, "the request did not arrive within 0.6 seconds")
        with connected(HEAD) as head, connected(HEAD + b"Content-Length: 50\r\n\r\n{") as body, connected(b"") as idle:
            with connected(whole) as fourth:  # there are three
                assert said(fourth) == (503, "there are more than the 3 connections that are served")
            assert [said(connection) for connection in (head, body, idle)] == [late] * 3
        # a byte now and then does not help
        chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        with connected(chunked) as drip, pytest.raises(OSError, match=r"pipe|reset"):
            keep_sending(drip)
        for head in (HEAD + b"X: " + b"0" * 70_000, HEAD + b"X: " + b"0" * 70_000 + b"\r\n\r\n"):
            with connected(head) as connection:
                assert said(connection)[0] == 431
        with connected(b"no HTTP\r\n\r\n") as connection:
            assert said(connection) == (400, "the request is not valid HTTP")
        large = HEAD + b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1)
        with connected(large) as connection:  # a refused body may still be sent, and the connection goes on
            assert connection.recv(12) == b"HTTP/1.1 413"
            connection.sendall(b"0" * (MAX_BODY + 1) + whole.replace(b"Host", b"Connection: close\r\nHost"))
            found = b""
            while part := connection.recv(65536):
                found += part
            assert b"HTTP/1.1 200 OK" in found
        with connected(large) as connection:  # but not for ever
            assert said(connection)[0] == 413


def test_a_port_in_use() -> None:
    (first,) = bind("127.0.0.1", 0)
    with closing(first):
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ServingError, match=rf"port {port} of 127\.0\.0\.1 is in use; give another by --port"):
            bind("127.0.0.1", port)
    with pytest.raises(ServingError, match=r"cannot listen on port 1 of 192\.0\.2\.1"):
        bind("192.0.2.1", 1)


def test_a_second_sigterm_ends_at_once(export: Path) -> None:
    command = [sys.executable, "-m", "gralora_fx.cli", "serve", str(export), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "running on" in line)
        with closing(socket.create_connection(("127.0.0.1", int(line.rpartition(":")[2])))) as connection:
            connection.sendall(HEAD + b"Content-Length: 50\r\n\r\n{")  # which a first signal waits for
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            next(line for line in process.stderr if "Shutting down" in line)
            time.sleep(0.1)  # a signal within the line before would leave no place for its own
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 128 + signal.SIGTERM
        assert "SIGTERM again: ended at once" in process.stderr.read()
    finally:
        process.kill()
        process.communicate(timeout=20)
