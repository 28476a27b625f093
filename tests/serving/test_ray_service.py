"""`gralora-fx serve --engine ray`: adapters over replicas, a full queue, a replica that is killed, and the end."""

from __future__ import annotations

import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import openai
import psutil
import pytest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families
from served_exports import chat_tokenizer, decoders, greedy
from typer.testing import CliRunner

from gralora_fx.cli import app
from gralora_fx.errors import ConfigError, GraloraError, ServingError

ROWS, WAITING = 2, 12
GONE = "the replica that ran the request has ended; try again"


class Replicated:
    """A service with two replicas, and what OpenAI's client says of it."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", "gralora_fx.cli", "serve", str(path), "--engine", "ray", "--port", "0"]
        command += ["--threads", "1", "--max-batch", str(ROWS), "--max-queue", str(WAITING), "--api-key", "secret"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        urls: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self.lines.append(line)
                if found := re.search(r"running on (http://127\.0\.0\.1:\d+);", line):
                    urls.put(found[1])
            urls.put(None)

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        url = urls.get(timeout=300)
        assert url is not None, "".join(self.lines)
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=60)
        self.root = openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=60)

    def processes(self) -> list[psutil.Process]:
        """All processes that the service has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[psutil.Process]:
        """Those with the model."""
        return [
            process
            for process in self.processes()
            if "ServeReplica:gralora-fx-model:model" in "".join(_command(process))
        ]

    def tokens(self, replica: psutil.Process) -> float:
        """How many tokens a replica has answered with."""
        folder = Path(replica.environ()["PROMETHEUS_MULTIPROC_DIR"])
        values = MmapedDict.read_all_values_from_file(str(folder / f"counter_{replica.pid}.db"))
        return sum(value for key, value, *_ in values if "gralora_fx_tokens_total" in key and "generated" in key)

    def ask(self, model: str, *, stream: bool = False, tokens: int = 40) -> tuple[str, str]:
        """The text of an answer, or an error's status and message."""
        options: dict[str, Any] = {"model": model, "prompt": "Hello", "temperature": 0, "max_tokens": tokens}
        try:
            if stream:
                chunks = self.client.completions.create(**options, stream=True)
                return "text", "".join(chunk.choices[0].text for chunk in chunks)
            return "text", self.client.completions.create(**options).choices[0].text
        except openai.APIStatusError as error:
            retry = "" if error.response.headers.get("retry-after") is None else ", to be tried again"
            return f"{error.status_code}{retry}", error.body["message"]  # type: ignore[index]
        except openai.APIError as error:
            return "event", error.message


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Any]]:
    paths, oracles = decoders(tmp_path_factory.mktemp("replicas"), "batched")
    return paths["batched"], oracles


@pytest.fixture(scope="module")
def service(exported: tuple[Path, dict[str | None, Any]]) -> Iterator[Replicated]:
    running = Replicated(exported[0])
    processes = [running.process, *running.processes()]
    yield running
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    running.process.wait(20)


@pytest.fixture(scope="module")
def texts(exported: tuple[Path, dict[str | None, Any]]) -> dict[str, str]:
    """What each model answers."""
    tokenizer, oracles = chat_tokenizer(), exported[1]
    prompt = tokenizer("Hello")["input_ids"]
    return {
        name or "batched": str(tokenizer.decode(greedy(oracle, prompt, 40), skip_special_tokens=True))
        for name, oracle in oracles.items()
    }


def test_each_request_has_its_adapter(service: Replicated, texts: dict[str, str]) -> None:
    assert len(set(texts.values())) == 3
    assert [model.id for model in service.client.models.list()] == list(texts)
    asked = [(name, stream) for name in texts for stream in (False, True)]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda pair: service.ask(pair[0], stream=pair[1]), asked))
    assert found == [("text", texts[name]) for name, _ in asked]


def test_errors_are_openais(service: Replicated) -> None:
    assert service.ask("other") == ("404", "no model 'other'; there is batched, small, wide")
    assert "beyond the context" in service.ask("wide", tokens=64)[1]
    with pytest.raises(openai.NotFoundError, match="no model 'x'"):
        service.client.models.retrieve("x")
    with pytest.raises(openai.BadRequestError, match="not JSON"):
        service.client.post("/completions", content=b"{", cast_to=object)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        service.client.copy(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        service.root.get("/other", cast_to=object)


def test_health_needs_no_key(service: Replicated) -> None:
    client = service.root.copy(api_key="wrong")
    assert client.get("/v2/health/live", cast_to=object) == {"live": True}
    assert client.get("/v2/health/ready", cast_to=object) == {"ready": True}


def test_a_hot_adapter_spreads(service: Replicated, texts: dict[str, str]) -> None:
    replicas = service.replicas()
    assert len(replicas) == 2
    before = [service.tokens(replica) for replica in replicas]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(service.ask, ["wide"] * 16)) == {("text", texts["wide"])}
    grown = [service.tokens(replica) - count for replica, count in zip(replicas, before, strict=True)]
    assert all(count > 0 for count in grown)
    measured = service.root.get("/metrics", cast_to=str)
    families = {family.name: family for family in text_string_to_metric_families(measured)}
    generated = [s.value for s in families["gralora_fx_tokens"].samples if s.labels == {"kind": "generated"}]
    assert generated == [sum(before) + sum(grown)]


def test_a_full_queue_answers_at_once(service: Replicated, texts: dict[str, str]) -> None:
    with ThreadPoolExecutor(48) as pool:
        found = Counter(pool.map(service.ask, ["small"] * 96))
    full = ("429, to be tried again", "as many requests wait as there is room for; try again")
    assert set(found) == {("text", texts["small"]), full}


def test_a_killed_replica_loses_what_it_ran(service: Replicated, texts: dict[str, str]) -> None:
    """Under load by 6 clients, the other replica answers; the requests of the killed one, at most its rows, fail."""
    killed, kept = service.replicas()
    found: list[tuple[str, str, str]] = []
    is_done = threading.Event()

    def talk(index: int) -> None:
        while not is_done.is_set():
            name = list(texts)[len(found) % 3]
            found.append((name, *service.ask(name, stream=index % 2 == 0)))

    talking = [threading.Thread(target=talk, args=(index,)) for index in range(6)]
    for thread in talking:
        thread.start()
    while len(found) < 12:
        time.sleep(0.01)
    killed.kill()
    count = len(found)
    deadline = time.monotonic() + 60
    while len(found) < count + 24 or not {r.pid for r in service.replicas()} - {killed.pid} > {kept.pid}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    is_done.set()
    for thread in talking:
        thread.join(60)
    failed = [(kind, message) for name, kind, message in found if (kind, message) != ("text", texts[name])]
    assert len(failed) <= ROWS, failed  # none, if it ran nothing at that moment
    assert set(failed) <= {("503, to be tried again", GONE), ("event", GONE)}


def test_sigterm_lets_answers_end(service: Replicated, texts: dict[str, str]) -> None:
    processes = service.processes()
    stream = iter(
        service.client.completions.create(model="small", prompt="Hello", temperature=0, max_tokens=40, stream=True)
    )
    text = next(stream).choices[0].text
    service.process.send_signal(signal.SIGTERM)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == texts["small"]
    assert service.process.wait(60) == 128 + signal.SIGTERM
    service.reader.join(20)
    assert "Traceback" not in "".join(service.lines)
    assert psutil.wait_procs(processes, 10)[1] == []


def error(*arguments: str) -> GraloraError:
    found = CliRunner().invoke(app, ["serve", *arguments]).exception
    assert isinstance(found, GraloraError)
    return found


def test_errors_before_serving(tmp_path: Path) -> None:
    assert isinstance(error(str(tmp_path), "--replicas", "2"), ConfigError)
    assert "--engine is uvicorn or ray, but got 'x'" in str(error(str(tmp_path), "--engine", "x"))
    assert "gralora_export.json" in str(error(str(tmp_path), "--engine", "ray"))
    with patch.dict(sys.modules, {"ray": None}):
        for name in [name for name in sys.modules if name.startswith("gralora_fx.serving.scale")]:
            del sys.modules[name]
        missing = error(str(tmp_path), "--engine", "ray")
    assert str(missing) == "serve needs ray, which is not installed; pip install 'gralora-fx[scale]'"


def test_a_port_in_use(exported: tuple[Path, dict[str | None, Any]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = error(str(exported[0]), "--engine", "ray", "--port", port)
    assert isinstance(found, ServingError)
    assert str(found).startswith(f"cannot listen on 127.0.0.1:{port} (")
