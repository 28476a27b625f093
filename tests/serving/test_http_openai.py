"""OpenAI's protocol as clients use it: the official client, a compliance tester, deadlines, clients that go away."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import llm_comply
import openai
import pytest
from llm_comply.config import ComplianceConfig
from llm_comply.runner import TestRunner as ComplianceRunner
from llm_comply.schema import SpecLoader
from llm_comply.tests.open_responses import OPEN_RESPONSES_TESTS
from llm_comply.tests.openai_chat import OPENAI_CHAT_TESTS
from running_service import serving
from served_exports import ADAPTERS, CACHED, adapted, chat_tokenizer

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app
from gralora_fx.serving import Decoder, load

BASE = "data"
ENDS = list(range(90, 101))  # a random model chooses one soon
ALL_OPTIONS = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an export that has room for a conversation in letters."""
    folder = tmp_path_factory.mktemp("openai")
    sizes = {"eos_token_id": ENDS, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 1024}
    model, _ = adapted("llama", folder, CACHED, **sizes)
    export_onnx(model, folder / BASE, adapters="data", verify=False, tokenizer=chat_tokenizer())
    return folder


@pytest.fixture(scope="module")
def service(exported: Path) -> Iterator[tuple[str, int, Any]]:
    """Yield the base's name, the port and the app."""
    app = create_app(ServiceSettings(exported / BASE, max_batch=4, max_queue=4, api_key="secret"))
    with serving(app) as (_, port):
        yield BASE, port, app


def options_of(port: int) -> dict[str, Any]:
    return {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "secret", "timeout": 30}


@pytest.fixture
def client(service: tuple[str, int, Any]) -> openai.OpenAI:
    return openai.OpenAI(**options_of(service[1]), max_retries=0)


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every step of a decoder take so long."""
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *given: (time.sleep(seconds), step(*given))[1])


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def seeded(build: Callable[[Any], dict[str, Any]], config: Any) -> dict[str, Any]:
    """Return a request whose random answer is the same in every run, and not empty."""
    return {**build(config), "seed": 1}


@pytest.mark.parametrize(
    ("tests", "spec", "image"),
    [
        (OPENAI_CHAT_TESTS, "openai_chat.json", ("chat-image-input", "messages.0.content")),
        (OPEN_RESPONSES_TESTS, "openresponses.json", ("image-input", "input.0.content")),
    ],
    ids=["chat", "responses"],
)
def test_the_compliance_tests_pass(
    service: tuple[str, int, Any], tests: list[Any], spec: str, image: tuple[str, str]
) -> None:
    """All but those of images, which are refused by name; those of tools need letters that end no answer."""
    name, port, _ = service
    tests = [test for test in tests if "tool" not in test.id]
    config = ComplianceConfig(f"http://127.0.0.1:{port}/v1", "secret", model=name, verbose=True)
    own = [dataclasses.replace(test, build_request=partial(seeded, test.build_request)) for test in tests]
    loaded = SpecLoader(str(Path(llm_comply.__file__).parent / "specs" / spec))
    results = {result.id: result for result in ComplianceRunner(config, own, loaded).run_all().results}
    failed = {name: result for name, result in results.items() if result.status.value not in ("passed", "skipped")}
    assert failed.keys() == {image[0]}
    assert image[1] in str(failed[image[0]].response)
    warned = {name for name, result in results.items() if result.warnings} - {*failed, "compact-response"}
    assert not warned


def test_what_clients_send_by_default_changes_nothing(client: openai.OpenAI, service: tuple[str, int, Any]) -> None:
    messages: Any = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b", "name": "c"}]
    idle: dict[str, Any] = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    idle |= {"parallel_tool_calls": False, "tool_choice": "none", "response_format": {"type": "text"}}
    idle |= {"modalities": ["text"], "safety_identifier": "x", "prompt_cache_key": "y", "tools": [], "logit_bias": {}}
    idle |= {"reasoning_effort": None, "audio": None, "n": None, "stop": None}
    plain = client.chat.completions.create(model="wide", messages=messages, **ALL_OPTIONS)
    found = client.chat.completions.create(model="wide", messages=messages, **ALL_OPTIONS, **idle)
    assert found.choices == plain.choices
    assert found.usage is not None
    assert plain.usage is not None
    assert found.usage.total_tokens == plain.usage.total_tokens
    answer = plain.choices[0].message.model_dump()  # goes back as it came
    client.chat.completions.create(model="wide", messages=[*messages, answer, messages[1]], **ALL_OPTIONS)
    for wrong in (
        {"verbosity": "low"},
        {"modalities": ["audio"]},
    ):
        with pytest.raises(openai.BadRequestError, match=f"{next(iter(wrong))} is not supported; leave it out"):
            client.chat.completions.create(model="wide", messages=messages, **wrong)


def test_several_answers_and_prompts(client: openai.OpenAI, service: tuple[str, int, Any], exported: Path) -> None:
    prompts = ["Hello", "ab"]
    options: dict[str, Any] = {"model": "small", "prompt": prompts, "n": 2}
    options |= {"max_tokens": 8, "temperature": 1.3, "seed": 5}
    found = client.completions.create(**options)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage is not None
    assert found.usage.prompt_tokens == 5 + 2
    model = load(exported / service[0])
    draws: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 1.3, "seed": 5}
    texts = model.generate([prompts[0]] * 2 + [prompts[1]] * 2, adapter="small", max_new_tokens=8, **draws)
    assert [choice.text for choice in found.choices] == texts
    assert len(set(texts)) > 2
    streamed = [""] * 4
    for chunk in client.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_vllms_fields(client: openai.OpenAI, service: tuple[str, int, Any], exported: Path) -> None:
    model = load(exported / service[0])
    ids = model.tokenizer("Hello")["input_ids"]

    def answer(**more: Any) -> str:
        given = {"model": "wide", "prompt": "Hello", "max_tokens": 12, "temperature": 0}
        return client.completions.create(**given, extra_body=more).choices[0].text

    def expected(**more: Any) -> str:
        tokens = model.generate(ids, adapter="wide", max_new_tokens=12, **more)
        return str(model.tokenizer.decode(tokens, skip_special_tokens=True))

    assert answer(repetition_penalty=1.6) == expected(repetition_penalty=1.6)
    assert answer(min_tokens=10) == expected(min_new_tokens=10)
    assert answer(presence_penalty=2, frequency_penalty=0.3) == expected(presence_penalty=2, frequency_penalty=0.3)
    assert answer(logit_bias={"40": 100}) == expected(logit_bias={40: 100.0})
    more = sorted({*ENDS, *range(40, 60)})
    assert answer(stop_token_ids=list(range(40, 60))) == expected(eos_token_id=more)
    assert answer(ignore_eos=True) == expected(eos_token_id=[])


def test_the_async_client_and_raw_responses(service: tuple[str, int, Any]) -> None:
    name, port, _ = service

    async def talk() -> tuple[list[str], str, int]:
        async with openai.AsyncOpenAI(**options_of(port), max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "hi"}]
            create, names = client.chat.completions.create, (*ADAPTERS, name)
            answers = await asyncio.gather(*(create(model=each, messages=messages, **ALL_OPTIONS) for each in names))
            stream = await client.chat.completions.create(
                model=name, messages=messages, stream=True, stream_options={"include_usage": True}, **ALL_OPTIONS
            )
            text, used = "", 0
            async for chunk in stream:
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                used = chunk.usage.total_tokens if chunk.usage else used
            raw = await client.chat.completions.with_raw_response.create(model=name, messages=messages, **ALL_OPTIONS)
            assert raw.headers["content-type"] == "application/json"
            assert raw.parse().choices == answers[-1].choices
            return [answer.choices[0].message.content or "" for answer in answers], text, used

    texts, text, used = asyncio.run(talk())
    assert texts[-1] == text
    assert len(set(texts)) == 3
    assert used > len("user: hi assistant: ")


def test_errors_are_the_clients_own(
    client: openai.OpenAI, service: tuple[str, int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="top_logprobs has no effect without logprobs"):
        client.chat.completions.create(model="wide", messages=[{"role": "user", "content": "a"}], top_logprobs=2)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong").models.list()
    slow(monkeypatch, 0.03)
    long: dict[str, Any] = {"model": "wide", "prompt": ["a"] * 8, "max_tokens": 20, "temperature": 0}
    long["extra_body"] = {"min_tokens": 20}
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(client.completions.create, **long)
        until(lambda: service[2].state.engine.queue.in_flight == 8)
        with pytest.raises(openai.RateLimitError, match="there is room for 8") as refused:
            client.completions.create(**{**long, "prompt": "a"})
        assert refused.value.response.headers["retry-after"] == "1"
        patient = client.with_options(max_retries=5)  # waits as it is told, and is answered
        assert patient.completions.create(model="wide", prompt="a", max_tokens=1, temperature=0).usage is not None
        assert len(taken.result().choices) == 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request_and_leaves_its_mates(
    service: tuple[str, int, Any], monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    _, port, app = service
    client, queue = openai.OpenAI(**options_of(port), max_retries=3), app.state.engine.queue
    long: dict[str, Any] = {"model": "wide", "prompt": "a", "max_tokens": 30, "temperature": 0}
    long["extra_body"] = {"min_tokens": 30}
    expected = client.completions.create(**long).choices[0].text
    slow(monkeypatch, 0.02)
    with ThreadPoolExecutor(1) as pool:
        mate = pool.submit(client.completions.create, **long)
        started = time.monotonic()
        late = {**long, "max_tokens": 900, "extra_body": {"min_tokens": 900}, "stream": stream}
        late["extra_headers"] = {"X-Request-Timeout": "0.3"}
        with pytest.raises(openai.APIError, match=r"was not answered within 0\.3 s, and was cancelled") as error:
            list(client.completions.create(**late))
        if not stream:
            assert isinstance(error.value, openai.InternalServerError)
            assert error.value.status_code == 504
        assert time.monotonic() - started < 10  # it was not asked again
        assert mate.result().choices[0].text == expected
    until(lambda: queue.in_flight == 0)
    with pytest.raises(
        openai.BadRequestError, match="X-Request-Timeout must be a number of seconds above 0, but got 'x'"
    ):
        client.completions.create(**{**long, "extra_headers": {"X-Request-Timeout": "x"}})


def test_a_client_gone_midstream_frees_its_row_within_a_second(
    service: tuple[str, int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, port, app = service
    queue = app.state.engine.queue
    client = openai.OpenAI(**options_of(port), max_retries=0)
    mate: dict[str, Any] = {"model": "wide", "prompt": "b", "max_tokens": 60, "temperature": 0}
    mate["extra_body"] = {"min_tokens": 60}
    expected = client.completions.create(**mate).choices[0].text
    slow(monkeypatch, 0.02)
    body = json.dumps({"model": "wide", "prompt": "a", "max_tokens": 900, "min_tokens": 900, "stream": True})
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer secret\r\n"
    )
    with ThreadPoolExecutor(1) as pool:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall((head + f"Content-Length: {len(body)}\r\n\r\n" + body).encode())
            assert b"200 OK" in connection.recv(4096)
            answering = pool.submit(client.completions.create, **mate)
            until(lambda: queue.in_flight == 2)
            connection.recv(4096)
        until(lambda: queue.in_flight == 1, 1)
        assert answering.result().choices[0].text == expected
    until(lambda: queue.in_flight == 0)
