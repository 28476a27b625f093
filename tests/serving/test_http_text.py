"""Text over HTTP by OpenAI's protocol: answers are transformers' greedy tokens, streamed or not; bad requests."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served_exports import chat_tokenizer, decoders, greedy
from starlette.testclient import TestClient

from gralora_fx.cli.values import read_adapters
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ConfigError, ServingError
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.service.app import create_app

PROMPTS = ["Hello there", "a", "The capital of France is a town", "x y z"]
MODE = "data"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str | None, Any]]:
    return decoders(tmp_path_factory.mktemp("http"), MODE)


@pytest.fixture(scope="module")
def service(
    exported: tuple[dict[str, Path], dict[str | None, Any]],
) -> Iterator[tuple[TestClient, str, dict[str | None, Any]]]:
    """Yield a client, the base's name and the oracles."""
    with TestClient(create_app(ServiceSettings(exported[0][MODE], max_batch=3))) as client:
        yield client, MODE, exported[1]


@pytest.fixture(scope="module")
def one_service(exported: tuple[dict[str, Path], dict[str | None, Any]]) -> Iterator[TestClient]:
    with TestClient(create_app(ServiceSettings(exported[0]["data"]))) as client:
        yield client


def expected(oracle: Any, prompt: str, count: int) -> str:
    tokenizer = chat_tokenizer()
    return str(tokenizer.decode(greedy(oracle, tokenizer(prompt)["input_ids"], count), skip_special_tokens=True))


def events(text: str) -> list[dict[str, Any]]:
    """Return the objects of a stream, which ends with [DONE]."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_concurrent_answers_are_transformers_tokens(service: tuple[TestClient, str, dict[str | None, Any]]) -> None:
    client, base, oracles = service
    asked = [(prompt, adapter) for prompt in PROMPTS for adapter in oracles]

    def answer(prompt: str, adapter: str | None) -> dict[str, Any]:
        body = {"model": adapter or base, "prompt": prompt, "temperature": 0, "max_tokens": 12}
        return client.post("/v1/completions", json=body).raise_for_status().json()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda pair: answer(*pair), asked))
    texts = [found["choices"][0]["text"] for found in answers]
    assert texts == [expected(oracles[adapter], prompt, 12) for prompt, adapter in asked]
    assert len(set(texts)) > len(PROMPTS)  # adapters change answers
    assert [found["model"] for found in answers] == [adapter or base for _, adapter in asked]
    for (prompt, _), found in zip(asked, answers, strict=True):
        assert found["usage"]["prompt_tokens"] == len(prompt)
        assert found["usage"]["total_tokens"] == len(prompt) + found["usage"]["completion_tokens"]


def test_a_stream_is_the_whole_answer(service: tuple[TestClient, str, dict[str | None, Any]]) -> None:
    client, _, oracles = service
    body = {"model": "wide", "prompt": PROMPTS[:2], "temperature": 0, "max_tokens": 9, "stream": True}
    found = events(client.post("/v1/completions", json={**body, "stream_options": {"include_usage": True}}).text)
    texts, endings = ["", ""], [[], []]
    for event in found[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        endings[choice["index"]].append(choice["finish_reason"])
    assert texts == [expected(oracles["wide"], prompt, 9) for prompt in PROMPTS[:2]]
    assert all(ending[-1] in ("length", "stop") and set(ending[:-1]) <= {None} for ending in endings)
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["prompt_tokens"] == sum(map(len, PROMPTS[:2]))


@pytest.mark.quick
def test_chats_go_through_the_template(service: tuple[TestClient, str, dict[str | None, Any]]) -> None:
    client, _, oracles = service
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    body = {"model": "small", "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 8}
    reference = expected(oracles["small"], "user: hi assistant: ", 8)
    whole = client.post("/v1/chat/completions", json=body).json()
    message = {"role": "assistant", "content": reference, "refusal": None, "annotations": []}
    assert whole["choices"][0]["message"] == message
    found = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    deltas = [event["choices"][0]["delta"] for event in found]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == reference
    assert {event["object"] for event in found} == {"chat.completion.chunk"}


def test_a_stop_string_ends_an_answer(service: tuple[TestClient, str, dict[str | None, Any]]) -> None:
    client, base, oracles = service
    whole = expected(oracles[None], "Hello there", 12)
    body = {"model": base, "prompt": "Hello there", "temperature": 0, "max_tokens": 12, "stop": [whole[4:6]]}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == whole[: whole.index(whole[4:6])]
    assert choice["finish_reason"] == "stop"


def test_seeds_repeat_draws(service: tuple[TestClient, str, dict[str | None, Any]]) -> None:
    client, base, oracles = service

    def draw(**options: Any) -> str:
        body = {"model": base, "prompt": "Hello", "max_tokens": 12, **options}
        return str(client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"])

    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=-1) == draw(seed=-1)
    assert len({draw(seed=seed, top_p=0.9, temperature=1.5) for seed in range(4)}) > 1
    assert draw(top_k=1) == expected(oracles[None], "Hello", 12)


def test_models_are_listed(service: tuple[TestClient, str, dict[str | None, Any]]) -> None:
    client, base, _ = service
    found = client.get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in found] == [(base, None), ("small", base), ("wide", base)]
    assert client.get("/v1/models/wide").json()["id"] == "wide"
    assert client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "other"}, 404, "no model 'other'; there is data, small, wide"),
        ({"model": "\ud800"}, 404, "no model"),
        ({"model": 5}, 400, "model: "),
        ({"model": {"small": 0.7, "wide": 0.3}}, 400, "model is not a name: a request names one adapter"),
        ({"adapter": {"small": 0.7, "wide": 0.3}}, 400, "which mix_adapters makes in Python"),
        ({"prompt": ""}, 400, "the prompt has no tokens"),
        ({"prompt": []}, 400, "the prompt has no tokens"),
        ({"prompt": ["a", ""]}, 400, "the prompt has no tokens"),
        ({"prompt": [101]}, 400, "outside the vocabulary of 101 tokens"),
        ({"prompt": [-1]}, 400, "outside the vocabulary of 101 tokens"),
        ({"prompt": "\ud800"}, 400, "the tokenizer does not take the prompt"),
        ({"prompt": "a" * 64}, 400, "beyond the context of 64 tokens"),
        ({"prompt": "a", "max_tokens": 64}, 400, "beyond the context of 64 tokens"),
        ({"prompt": ["a"] * 100}, 400, "there is room for 80"),
        ({"max_tokens": 0}, 400, "max_tokens is 0, which leaves nothing to answer"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "1"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n: "),
        ({"n": 2, "best_of": 2}, 400, "best_of is not supported; leave it out"),
        ({"stop": ""}, 400, "a stop string is empty"),
        ({"stop": [1]}, 400, "stop.0: Input should be a valid string"),
        ({"prompt": 5}, 400, "prompt: Input should be"),
        ({"function": 5}, 400, "function is not supported; leave it out"),
        ({"stream_options": {"include_usage": True}}, 400, "no effect without stream"),
        ({"logprobs": 6}, 400, "logprobs"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"logprobs": 1, "echo": True}, 400, "export the model with logits='all'"),
        ({"frequency_penalty": 3}, 400, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias names 'x', which is not the id of a token"),
        ({"logit_bias": {"101": 1}}, 400, "logit_bias names token 101, outside the vocabulary of 101 tokens"),
        ({"stop_token_ids": [101]}, 400, "the tokens that end the answer hold 101"),
        ({"min_tokens": 2}, 400, "min_tokens=2 is above the 1 tokens that are asked for"),
        ({"suffix": "b"}, 400, "suffix is not supported; leave it out"),
        ({"best_of": 2}, 400, "best_of is not supported; leave it out"),
    ],
)
def test_bad_requests(one_service: TestClient, change: dict[str, Any], status: int, message: str) -> None:
    body = json.dumps({"model": "small", "prompt": "a", "max_tokens": 1, **change})
    found = one_service.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == status
    error = found.json()["error"]
    assert message in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": "a"}', b"[" * 100_000, b'{"n": NaN}'])
def test_bad_bodies(one_service: TestClient, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        found = one_service.post(path, content=body, headers={"Content-Type": "application/json"})
        assert found.status_code == 400
        assert found.json()["error"]["type"] == "invalid_request_error"


def test_a_part_of_a_message_that_is_not_text_is_named(one_service: TestClient) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    body = {"model": "small", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, image]}]}
    error = one_service.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "messages.0.content.1.image_url.url"
    assert error["message"] == "messages.0.content.1.image_url.url: this model reads text alone; leave it out"


def test_paths_and_methods_that_are_not_there(one_service: TestClient) -> None:
    error = one_service.get("/other").json()["error"]
    assert (error["code"], error["message"].split(";")[0]) == (404, "there is no '/other' here")
    assert one_service.get("/health").json() == {"ready": True}
    assert one_service.get("/v1/completions").json()["error"]["code"] == 405
    assert one_service.post("/v1/embeddings", json={}).status_code == 404  # of a decoder


class SlowSteps:
    """Lets each step of decoders wait for a permit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.permits = threading.Semaphore(0)
        self.count = 0
        step = Decoder.step

        def wait(decoder: Decoder, tokens: Any, *more: Any) -> Any:
            assert self.permits.acquire(timeout=20)
            self.count += 1
            return step(decoder, tokens, *more)

        monkeypatch.setattr(Decoder, "step", wait)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def slow_app(exported: tuple[dict[str, Path], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, SlowSteps]:
    """Return an app with one row and one place in the queue, and its steps."""
    app = create_app(ServiceSettings(exported[0]["data"], max_batch=1, max_queue=1))
    return app, SlowSteps(monkeypatch)


def test_a_full_queue_answers_at_once(
    exported: tuple[dict[str, Path], dict[str | None, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, steps = slow_app(exported, monkeypatch)
    body = {"model": "small", "prompt": "ab", "temperature": 0, "max_tokens": 2}
    with TestClient(app) as client, ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(2)]
        until(lambda: app.state.engine.queue.in_flight == 2)
        refused = client.post("/v1/completions", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        steps.permits.release(10)
        assert [future.result().status_code for future in taken] == [200, 200]
        assert 'code="429",method="POST",route="/v1/completions"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(
    exported: tuple[dict[str, Path], dict[str | None, Any]], monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    app, steps = slow_app(exported, monkeypatch)
    queue = app.state.engine.queue
    body = {"model": "small", "prompt": "ab", "temperature": 0, "max_tokens": 50, "stream": stream}
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": ""}
    scope |= {"headers": [(b"content-type", b"application/json")], "client": ("test", 1), "server": ("test", 80)}

    async def talk() -> None:
        gone = asyncio.Event()

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            return None

        answering = asyncio.ensure_future(app(scope, receive, send))
        steps.permits.release(2)
        while steps.count < 2:
            await asyncio.sleep(0.005)
        gone.set()
        await asyncio.wait_for(answering, 10)

    queue.start()
    asyncio.run(talk())
    steps.permits.release(1)  # the step that ran when the client went
    until(lambda: queue.in_flight == 0)
    assert steps.count <= 3
    queue.stop()


def test_a_step_that_fails_is_answered_and_the_service_goes_on(
    exported: tuple[dict[str, Path], dict[str | None, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(ServiceSettings(exported[0]["data"]))
    body = {"model": "small", "prompt": "ab", "temperature": 0, "max_tokens": 2}
    with TestClient(app) as client:
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "step", lambda *_: (_ for _ in ()).throw(ValueError("secret")))
            failed = client.post("/v1/completions", json=body)
            streamed = client.post("/v1/completions", json={**body, "stream": True})
        assert failed.status_code == 500
        assert "secret" not in failed.text + streamed.text
        assert events(streamed.text)[-1]["error"]["type"] == "server_error"
        assert client.post("/v1/completions", json=body).status_code == 200


def test_adapters_of_the_command_line(exported: tuple[dict[str, Path], dict[str | None, Any]], tmp_path: Path) -> None:
    path = exported[0]["data"]
    more = read_adapters([f"again={path / 'adapters' / 'wide.onnx_adapter'}"])
    with TestClient(create_app(ServiceSettings(path, adapters=more))) as client:
        body = {"prompt": "Hello there", "temperature": 0, "max_tokens": 8}
        texts = [
            client.post("/v1/completions", json={"model": name, **body}).json()["choices"][0]["text"]
            for name in ("again", "wide")
        ]
        assert texts[0] == texts[1]
    with pytest.raises(ServingError, match="adapter 'data': 'data' is the name of the base; take another"):
        create_app(ServiceSettings(path, adapters={"data": more["again"]}))
    for wrong, message in ((["a"], "takes a name and a path as NAME=PATH"), (["a=b", "a=c"], "given twice")):
        with pytest.raises(ConfigError, match=message):
            read_adapters(wrong)


def test_a_shorter_context(exported: tuple[dict[str, Path], dict[str | None, Any]]) -> None:
    path = exported[0]["data"]
    with pytest.raises(ServingError, match="max_context=65 is above the model's context of 64"):
        create_app(ServiceSettings(path, max_context=65))
    with TestClient(create_app(ServiceSettings(path, max_context=10))) as client:
        found = client.post("/v1/completions", json={"model": "small", "prompt": "a" * 9, "max_tokens": 2})
        assert "beyond the context of 10 tokens" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"max_queue": True}, "max_queue"),
        ({"chunk": 0}, "chunk"),
        ({"timeout": 0}, "timeout"),
        ({"api_key": ""}, "API key"),
    ],
)
def test_bad_settings(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServiceSettings(tmp_path, **fields)
