"""`gralora-fx serve` as a process of its own, spoken to by OpenAI's own client."""

from __future__ import annotations

import gc
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from running_service import permitted
from served_exports import chat_tokenizer, decoders, greedy
from typer.testing import CliRunner

from gralora_fx.cli import app
from gralora_fx.cli.serve import _no_collections
from gralora_fx.errors import ConfigError, ServingError

ORIGINS = ("https://a.example.org", "http://localhost:5173")


class Server:
    """A running service."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", "gralora_fx.cli", "serve", str(path), "--port", "0", "--threads", "1"]
        command += ["--adapter-root", str(path.parent), "--access-log", "--adapter", f"peft={path.parent / 'wide'}"]
        command += [part for origin in ORIGINS for part in ("--allow-origin", origin)]
        environment = {**os.environ, "GRALORA_FX_API_KEY": "secret"}
        self.access_log = path.parent / "access.log"
        with self.access_log.open("w") as stdout:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        ports: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert self.process.stderr is not None
            with self.process.stderr as lines:
                for line in lines:
                    self.lines.append(line)
                    if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                        ports.put(found[1])
            ports.put(None)

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        port = ports.get(timeout=60)
        assert port is not None, "".join(self.lines)
        self.url = f"http://127.0.0.1:{port}/v1"

    def client(self, key: str = "secret") -> openai.OpenAI:
        """OpenAI's client."""
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Any]]:
    paths, oracles = decoders(tmp_path_factory.mktemp("command"), "data")
    return paths["data"], oracles


@pytest.fixture(scope="module")
def server(exported: tuple[Path, dict[str | None, Any]]) -> Iterator[Server]:
    """Yield a process that all tests ask; the last of them ends it."""
    running = Server(exported[0])
    yield running
    running.process.kill()
    running.process.wait(20)


def expected(oracle: Any, prompt: str, count: int) -> str:
    tokenizer = chat_tokenizer()
    return str(tokenizer.decode(greedy(oracle, tokenizer(prompt)["input_ids"], count), skip_special_tokens=True))


def test_openais_client(server: Server, exported: tuple[Path, dict[str | None, Any]]) -> None:
    oracles = exported[1]
    client = server.client()
    assert [model.id for model in client.models.list()] == ["data", "peft", "small", "wide"]

    def answer(adapter: str | None) -> str:
        found = client.completions.create(model=adapter or "data", prompt="Hello", temperature=0, max_tokens=10)
        assert found.usage is not None
        assert found.usage.prompt_tokens == 5
        return found.choices[0].text

    with ThreadPoolExecutor(9) as pool:
        texts = list(pool.map(answer, [*oracles] * 3))
    assert texts == [expected(oracles[adapter], "Hello", 10) for adapter in oracles] * 3
    assert answer("peft") == expected(oracles["wide"], "Hello", 10)
    messages: Any = [{"role": "user", "content": "hi"}]
    options: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 10, "model": "wide"}
    reference = expected(oracles["wide"], "user: hi assistant: ", 10)
    assert client.chat.completions.create(**options).choices[0].message.content == reference
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == reference
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len("user: hi assistant: ")
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="is not supported"):
        client.completions.create(model="wide", prompt="a", suffix="b")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        server.client("wrong").models.list()
    deadline = time.monotonic() + 20
    while len(lines := server.access_log.read_text().splitlines()) < 16:
        assert time.monotonic() < deadline  # a line is written when its answer has gone
    asked = Counter((line.split('"')[1].removesuffix(" HTTP/1.1"), line.split()[-3]) for line in lines)
    assert asked == {
        ("GET /v1/models", "200"): 1,
        ("GET /v1/models", "401"): 1,
        ("POST /v1/completions", "200"): 10,
        ("POST /v1/completions", "400"): 1,
        ("POST /v1/completions", "404"): 1,
        ("POST /v1/chat/completions", "200"): 2,
    }
    assert not any(word in line for line in lines for word in ("Hello", "secret", "Bearer", "wrong"))


def test_pages_of_each_origin_may_ask(server: Server) -> None:
    for origin in ORIGINS:
        assert permitted(f"{server.url}/completions", origin) == ([origin], [origin])


def test_adapters_are_loaded_by_requests(server: Server, exported: tuple[Path, dict[str | None, Any]]) -> None:
    client = server.client()
    fields = {"lora_name": "new", "lora_path": "wide"}
    assert "added successfully" in client.post("/load_lora_adapter", body=fields, cast_to=str)
    found = client.completions.create(model="new", prompt="Hello", temperature=0, max_tokens=10)
    assert found.choices[0].text == expected(exported[1]["wide"], "Hello", 10)
    assert [model.id for model in client.models.list()] == ["data", "new", "peft", "small", "wide"]
    with pytest.raises(openai.BadRequestError, match="is loaded already"):
        client.post("/load_lora_adapter", body=fields, cast_to=str)
    with pytest.raises(openai.NotFoundError, match="there is no adapter at 'none'"):
        client.post("/load_lora_adapter", body={**fields, "lora_name": "x", "lora_path": "none"}, cast_to=str)
    assert "removed successfully" in client.post("/unload_lora_adapter", body={"lora_name": "new"}, cast_to=str)
    with pytest.raises(openai.NotFoundError, match="no model 'new'"):
        client.completions.create(model="new", prompt="a")
    assert not any("Traceback" in line for line in server.lines)


def test_sigterm_lets_answers_end(server: Server, exported: tuple[Path, dict[str | None, Any]]) -> None:
    client = server.client()
    options: dict[str, Any] = {"model": "small", "prompt": "Hello", "temperature": 0, "max_tokens": 50}
    stream = iter(client.completions.create(**options, stream=True))
    text = next(stream).choices[0].text
    server.process.send_signal(signal.SIGTERM)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == expected(exported[1]["small"], "Hello", 50)
    assert server.process.wait(20) == 128 + signal.SIGTERM
    server.reader.join(20)
    assert "Traceback" not in "".join(server.lines)
    with pytest.raises(openai.APIConnectionError):
        client.completions.create(**options)


def test_errors_before_serving(tmp_path: Path) -> None:
    def error(*arguments: str) -> Exception | None:
        found = CliRunner().invoke(app, ["serve", *arguments]).exception
        return found if isinstance(found, Exception) else None

    assert isinstance(error(str(tmp_path / "none")), ServingError)
    assert isinstance(error(str(tmp_path), "--adapter", "x"), ConfigError)
    manifest = {"schema_version": 1, "task": None, "precision": "fp32", "sites": []}
    (tmp_path / "gralora_export.json").write_text(json.dumps(manifest))
    assert isinstance(error(str(tmp_path), "--adapter-root", str(tmp_path / "none")), ConfigError)


def test_what_a_service_is_made_of_is_left_out_of_collections() -> None:
    gc.unfreeze()
    with _no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000
    gc.unfreeze()
