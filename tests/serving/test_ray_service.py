"""`gralora-fx serve --engine ray`: adapters over replicas, a full queue, a replica that is killed, and the end."""

from __future__ import annotations

import itertools
import json
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from peft_oracle import peft_model
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families
from running_service import permitted
from served_exports import CACHED, END, adapted, chat_tokenizer, greedy
from tiny_models import tiny_model
from typer.testing import CliRunner

from gralora_fx import trace
from gralora_fx.cli import app
from gralora_fx.errors import ConfigError, GraloraError, ServingError
from gralora_fx.exporters import export_onnx

ORIGIN = "https://chat.example.org"
ROWS, WAITING, CONTEXT = 2, 12, 512
GONE = "the replica that ran the request has ended; try again"


class Replicated:
    """A service with two replicas, and what OpenAI's client says of it."""

    def __init__(self, path: Path, *options: str) -> None:
        command = [sys.executable, "-m", "gralora_fx.cli", "serve", str(path), "--engine", "ray", "--port", "0"]
        command += ["--threads", "1", "--max-batch", str(ROWS), "--max-queue", str(WAITING), "--api-key", "secret"]
        command += options
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        urls: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert self.process.stderr is not None
            with self.process.stderr as lines:
                for line in lines:
                    self.lines.append(line)
                    if found := re.search(r"running on (http://127\.0\.0\.1:\d+);", line):
                        urls.put(found[1])
            urls.put(None)

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        try:
            url = urls.get(timeout=300)
        except queue.Empty:  # nothing of it stays behind
            for process in [*self.processes(), self.process]:
                process.kill()
            url = None
        assert url is not None, "".join(self.lines)
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=60)
        self.root = openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=60)

    def processes(self) -> list[psutil.Process]:
        """All processes that the service has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def processes_left(self) -> list[psutil.Process]:
        """Those that it has started later, while it runs."""
        return self.processes() if self.process.poll() is None else []

    def replicas(self) -> list[psutil.Process]:
        """Those with the model."""
        return [
            process
            for process in self.processes()
            if "ServeReplica:gralora-fx-model:model" in "".join(_command(process))
        ]

    def counted(self, replica: psutil.Process, *words: str) -> float:
        """Return the counts of a replica whose names and labels hold some words; 0 if it is not there."""
        try:
            folder = Path(replica.environ()["PROMETHEUS_MULTIPROC_DIR"])
            values = list(MmapedDict.read_all_values_from_file(str(folder / f"counter_{replica.pid}.db")))
        except (psutil.Error, FileNotFoundError):
            return 0
        return sum(value for key, value, *_ in values if all(word in key for word in words))

    def tokens(self, replica: psutil.Process) -> float:
        """Return how many tokens a replica has answered with."""
        return self.counted(replica, "gralora_fx_tokens_total", "generated")

    def ask(self, model: str, *, stream: bool = False, tokens: int = 40) -> tuple[str, str]:
        """Return the text of an answer, or an error's status and message."""
        options: dict[str, Any] = {"model": model, "prompt": "Hello", "temperature": 0, "max_tokens": tokens}

        def answer() -> str:
            if stream:
                chunks = self.client.completions.create(**options, stream=True)
                return "".join(chunk.choices[0].text for chunk in chunks)
            return self.client.completions.create(**options).choices[0].text

        return self.outcome(answer)

    def classify(self) -> tuple[str, str]:
        """Return the label of a text, or an error's status and message."""
        body = {"input": "Hello"}
        return self.outcome(lambda: self.root.post("/classify", body=body, cast_to=dict)["data"][0]["label"])  # type: ignore[type-arg]

    def outcome(self, answer: Callable[[], str]) -> tuple[str, str]:
        """Return an answer, or an error's status and message."""
        try:
            return "text", answer()
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
    folder = tmp_path_factory.mktemp("replicas")
    sizes = {"eos_token_id": END, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": CONTEXT}
    model, oracles = adapted("llama", folder, CACHED, **sizes)
    export_onnx(model, folder / "data", adapters="data", dora=True, verify=False, tokenizer=chat_tokenizer())
    return folder / "data", oracles


@contextmanager
def replicated(path: Path, *options: str) -> Iterator[Replicated]:
    """Yield a service, of whose processes none is left."""
    running = Replicated(path, *options)
    processes = [running.process, *running.processes()]
    try:
        yield running
    finally:
        for process in [*processes, *running.processes_left()]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        running.process.wait(20)


@pytest.fixture(scope="module")
def service(exported: tuple[Path, dict[str | None, Any]]) -> Iterator[Replicated]:
    """Yield a decoder, with an adapter that PEFT saved beside those of the export, and a log of its requests."""
    path = exported[0]
    root = ("--adapter-root", str(path.parent))
    root += ("--allow-origin", ORIGIN)
    with replicated(path, "--access-log", "--adapter", f"peft={path.parent / 'wide'}", *root) as running:
        yield running


@pytest.fixture(scope="module")
def texts(exported: tuple[Path, dict[str | None, Any]]) -> dict[str, str]:
    """Ask each model and return its answer."""
    tokenizer, oracles = chat_tokenizer(), exported[1]
    prompt = tokenizer("Hello")["input_ids"]
    found = {
        name or "data": str(tokenizer.decode(greedy(oracle, prompt, 40), skip_special_tokens=True))
        for name, oracle in oracles.items()
    }
    return {"data": found["data"], "peft": found["wide"], "small": found["small"], "wide": found["wide"]}


def test_each_request_has_its_adapter(service: Replicated, texts: dict[str, str]) -> None:
    assert len(set(texts.values())) == len(texts) - 1  # one is there twice
    assert [model.id for model in service.client.models.list()] == list(texts)
    asked = [(name, stream) for name in texts for stream in (False, True)]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda pair: service.ask(pair[0], stream=pair[1]), asked))
    assert found == [("text", texts[name]) for name, _ in asked]
    (folder,) = [
        found[1] for line in service.lines if (found := re.search("logs are in (.+), those of requests", line))
    ]
    deadline = time.monotonic() + 20
    while len(lines := Path(folder, "access.log").read_text().splitlines()) < len(asked) + 1:
        assert time.monotonic() < deadline  # a line is written when its answer has gone
    assert Counter(line.split('"')[1].split()[1] for line in lines) == {"/v1/models": 1, "/v1/completions": len(asked)}
    assert {line.split()[-3] for line in lines} == {"200"}
    assert not any(word in line for line in lines for word in ("Hello", "secret"))


def test_errors_are_openais(service: Replicated) -> None:
    status, message = service.ask("other")
    assert status == "404"
    assert message.startswith("no model 'other'; there is data, peft, small, wide, and those of the adapter root")
    assert "beyond the context" in service.ask("wide", tokens=CONTEXT)[1]
    with pytest.raises(openai.NotFoundError, match="no model 'x'"):
        service.client.models.retrieve("x")
    with pytest.raises(openai.BadRequestError, match="not JSON"):
        service.client.post("/completions", content=b"{", cast_to=object)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        service.client.copy(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        service.root.get("/other", cast_to=object)


def test_pages_of_an_origin_may_ask(service: Replicated) -> None:
    assert permitted(f"{service.client.base_url}completions", ORIGIN) == ([ORIGIN], [ORIGIN])


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


def test_what_a_request_loads_is_in_every_replica(service: Replicated, texts: dict[str, str]) -> None:
    def change(verb: str, **fields: Any) -> tuple[str, str]:
        return service.outcome(lambda: service.client.post(f"/{verb}_lora_adapter", body=fields, cast_to=str))

    def answers() -> set[tuple[str, str]]:
        with ThreadPoolExecutor(8) as pool:
            return set(pool.map(service.ask, ["live"] * 16))

    assert change("load", lora_name="live", lora_path="small")[0] == "text"
    assert answers() == {("text", texts["small"])}
    assert change("load", lora_name="live", lora_path="wide")[0] == "400"
    assert change("load", lora_name="live", lora_path="missing", load_inplace=True)[0] == "404"
    assert answers() == {("text", texts["small"])}
    assert change("unload", lora_name="live")[0] == "text"
    assert {status for status, _ in answers()} == {"404"}
    assert change("load", lora_name="live", lora_path="wide")[0] == "text"
    assert answers() == {("text", texts["wide"])}


def test_what_is_not_pinned_is_loaded_where_a_request_names_it(service: Replicated, texts: dict[str, str]) -> None:
    load: Any = {"lora_name": "loose", "lora_path": "wide", "pin": False}
    assert service.client.post("/load_lora_adapter", body=load, cast_to=str).startswith("Success")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(service.ask, ["loose"] * 16)) == {("text", texts["wide"])}
    service.client.post("/unload_lora_adapter", body={"lora_name": "loose"}, cast_to=str)
    assert service.ask("loose")[0] == "404"


def test_activated_and_dora_adapters(service: Replicated, exported: tuple[Path, dict[str | None, Any]]) -> None:
    """PEFT's, from the adapter root: every replica finds the invocation, and computes the norms of its weights."""
    prompt, fields = chat_tokenizer()("Hello")["input_ids"], {"target_modules": "all-linear", "r": 4, "lora_alpha": 32}
    sizes = {"eos_token_id": END, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": CONTEXT}
    expected, more = {}, {"alora_invocation_tokens": prompt[2:4], "task_type": "CAUSAL_LM"}
    for name, method in {"judge": {"method": "LORA", **more}, "rows": {"method": "DORA"}}.items():
        oracle = peft_model(tiny_model("llama", **sizes), 5, **fields, **method)
        oracle.save_pretrained(str(exported[0].parent / name))
        expected[name] = str(chat_tokenizer().decode(greedy(oracle, prompt, 40), skip_special_tokens=True))
    assert len({*expected.values(), service.ask("data")[1]}) == 3
    for name, text in expected.items():
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(service.ask, [name] * 16)) == {("text", text)}
    missing: Any = {"model": "judge", "prompt": prompt[:2], "max_tokens": 4}
    status, message = service.outcome(lambda: service.client.completions.create(**missing).choices[0].text)
    assert (status, message.startswith("adapter 'judge' acts from its tokens")) == ("400", True), message


def test_tools_and_responses(service: Replicated) -> None:
    city: Any = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    tool: Any = {"type": "function", "function": {"name": "get", "parameters": city}}
    asked: Any = {"model": "wide", "messages": [{"role": "user", "content": "a"}], "tools": [tool]}
    asked |= {"tool_choice": "required", "parallel_tool_calls": False}
    call = service.client.chat.completions.create(**asked).choices[0].message.tool_calls[0].function
    chunks = [chunk.choices[0].delta for chunk in service.client.chat.completions.create(**asked, stream=True)]
    parts = [delta.tool_calls[0].function for delta in chunks if delta.tool_calls]
    for name, arguments in ((call.name, call.arguments), (parts[0].name, "".join(part.arguments for part in parts))):
        assert name == "get"
        assert json.loads(arguments)["city"] in ("Paris", "Rome")
    own: Any = [{"type": "function", **tool["function"]}]
    response = service.client.responses.create(model="small", input="a", tools=own, tool_choice="required")
    assert response.output[0].type == "function_call"
    with service.client.responses.stream(model="small", input="a", max_output_tokens=3, temperature=0) as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"


def test_what_a_gateway_reads_is_of_all_replicas(service: Replicated) -> None:
    families = text_string_to_metric_families(service.root.get("/metrics", cast_to=str))
    found = {family.name: family.samples for family in families if family.name.startswith("vllm:")}
    assert [sample.value for sample in found["vllm:num_requests_running"]] == [0]
    assert [sample.value for sample in found["vllm:kv_cache_usage_perc"]] == [0]
    (adapters,) = found["vllm:lora_requests_info"]
    assert {"peft", "small", "wide"} <= {*adapters.labels["running_lora_adapters"].split(",")}


def test_a_full_queue_answers_at_once(service: Replicated, texts: dict[str, str]) -> None:
    with ThreadPoolExecutor(64) as pool:  # of which replicas take some that wait for nothing
        found = Counter(pool.map(service.ask, ["small"] * 128))
    full = ("429, to be tried again", "as many requests wait as there is room for; try again")
    assert set(found) == {("text", texts["small"]), full}


def kill_under_load(
    service: Replicated, ask: Callable[[int], tuple[str, str, str]], at_a_time: int, rounds: int = 2
) -> None:
    """Kill replicas under load by 6 clients: at most what one ran fails, each with an error; all else is answered.

    Args:
        service: The service.
        ask: Asks as one of the clients; what is expected, the kind of what came, and what came.
        at_a_time: How many requests a replica has at a time.
        rounds: How many replicas are killed.
    """
    found: list[tuple[str, str, str]] = []
    is_done = threading.Event()

    def talk(index: int) -> None:
        while not is_done.is_set():
            found.append(ask(index))

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def working() -> list[psutil.Process]:
        return [replica for replica in service.replicas() if service.counted(replica, "requests_total", "200")]

    talking = [threading.Thread(target=talk, args=(index,)) for index in range(6)]
    for thread in talking:
        thread.start()
    failed = 0
    try:
        for number in range(rounds):
            wait(lambda: len(working()) == 2)
            killed, count = working()[number % 2], len(found)
            killed.kill()
            wait(lambda count=count: len(found) >= count + 24)  # type: ignore[misc]
            wrong = [entry[1:] for entry in found if entry[1:] != ("text", entry[0])]
            assert len(wrong) - failed <= at_a_time, wrong  # none, if it ran nothing at that moment
            assert set(wrong) <= {("503, to be tried again", GONE), ("event", GONE)}
            failed = len(wrong)
    finally:
        is_done.set()
        for thread in talking:
            thread.join(60)
    assert {entry[1:] for entry in found if entry[1:] != ("text", entry[0])} <= {
        ("503, to be tried again", GONE),
        ("event", GONE),
    }


def test_a_killed_replica_loses_what_it_ran(service: Replicated, texts: dict[str, str]) -> None:
    texts = {**texts, "live": texts["wide"]}  # which a replica that starts has, too
    names = itertools.cycle(texts)

    def ask(index: int) -> tuple[str, str, str]:
        name = next(names)
        return (texts[name], *service.ask(name, stream=index % 2 == 0))

    kill_under_load(service, ask, 2 * ROWS)


def test_sigterm_lets_answers_end(service: Replicated, texts: dict[str, str]) -> None:
    processes = service.processes()
    stream = iter(
        service.client.completions.create(model="small", prompt="Hello", temperature=0, max_tokens=40, stream=True)
    )
    text = next(stream).choices[0].text
    service.process.send_signal(signal.SIGTERM)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == texts["small"]
    assert (
        service.process.wait(180) == 128 + signal.SIGTERM
    )  # a replica that still starts, after another test, does so first
    service.reader.join(20)
    assert "Traceback" not in "".join(service.lines)
    assert psutil.wait_procs(processes, 10)[1] == []


def test_a_killed_replica_of_a_classifier(tmp_path: Path) -> None:
    """Its answers are short: one may have ended when the replica does, and its connection goes on all the same."""
    model = tiny_model("bert", num_labels=3, pad_token_id=0)
    export_onnx(trace(model), tmp_path / "news", verify=False, tokenizer=chat_tokenizer())
    with replicated(tmp_path / "news") as service:
        kind, label = service.classify()
        assert kind == "text"

        def ask(_: int) -> tuple[str, str, str]:
            time.sleep(0.1)  # so that clients of short answers leave the processor to the replica that starts
            return (label, *service.classify())

        kill_under_load(service, ask, 2 * ROWS, rounds=1)


def error(*arguments: str) -> GraloraError:
    found = CliRunner().invoke(app, ["serve", *arguments]).exception
    assert isinstance(found, GraloraError)
    return found


def test_errors_before_serving(tmp_path: Path) -> None:
    assert isinstance(error(str(tmp_path), "--replicas", "2"), ConfigError)
    assert "--engine is uvicorn or ray, but got 'x'" in str(error(str(tmp_path), "--engine", "x"))
    assert "gralora_export.json" in str(error(str(tmp_path), "--engine", "ray"))


def test_a_port_in_use(exported: tuple[Path, dict[str | None, Any]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = error(str(exported[0]), "--engine", "ray", "--port", port)
    assert isinstance(found, ServingError)
    assert str(found).startswith(f"cannot listen on 127.0.0.1:{port} (")
