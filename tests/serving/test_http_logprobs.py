"""Log-probabilities over HTTP: those of transformers, streamed or not; prompts scored as evaluation harnesses do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served_exports import ADAPTERS, CACHED, END, adapted, chat_tokenizer, greedy
from starlette.testclient import TestClient

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app

PROMPT = "Hello there"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Any]]:
    folder = tmp_path_factory.mktemp("logprobs")
    model, oracles = adapted("llama", folder, CACHED, eos_token_id=END, bos_token_id=1, pad_token_id=0)
    export_onnx(model, folder / "base", adapters="data", verify=False, tokenizer=chat_tokenizer(), logits="all")
    return folder / "base", oracles


@pytest.fixture(scope="module", params=[{"chunk": 4}, {}])
def service(
    request: pytest.FixtureRequest, exported: tuple[Path, dict[str | None, Any]]
) -> Iterator[tuple[TestClient, dict[str | None, Any]]]:
    with TestClient(create_app(ServiceSettings(exported[0], **request.param))) as client:
        yield client, exported[1]


def scores(oracle: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each of some tokens."""
    with torch.no_grad():
        return oracle(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)  # type: ignore[no-any-return]


def expected(oracle: Any, prompt: str, count: int, top: int) -> tuple[list[int], list[float], list[dict[int, float]]]:
    """Return the greedy tokens, their log-probabilities, and those of the likeliest."""
    ids = chat_tokenizer()(prompt)["input_ids"]
    new = greedy(oracle, ids, count)
    rows = scores(oracle, ids + new)[len(ids) - 1 : -1]
    best = [dict(zip(row.topk(top).indices.tolist(), row.topk(top).values.tolist(), strict=True)) for row in rows]
    return new, [float(row[token]) for row, token in zip(rows, new, strict=True)], best


def name(token: int) -> str:
    """Return a token as chats have it; a part of a letter is a replacement character."""
    return str(chat_tokenizer().decode([token]))


def same(found: str, token: int) -> bool:
    """Return whether a completion's name of a token is right: a part of a letter is named by its bytes."""
    return found == name(token) or (found.startswith("bytes:\\x") and name(token) == "\ufffd")


def stream(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = client.post(path, json={**body, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logprobs_of_a_completion(service: tuple[TestClient, dict[str | None, Any]], adapter: str) -> None:
    client, oracles = service
    body = {"model": adapter, "prompt": PROMPT, "temperature": 0, "max_tokens": 6, "logprobs": 3}
    (choice,) = client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
    tokens, own, best = expected(oracles[adapter], PROMPT, 6, 3)
    found = choice["logprobs"]
    assert all(map(same, found["tokens"], tokens))
    assert found["token_logprobs"] == pytest.approx(own, abs=1e-4)
    for row, reference in zip(found["top_logprobs"], best, strict=True):
        assert sorted(row.values()) == pytest.approx(sorted(reference.values()), abs=1e-4)
        assert all(map(same, reversed(row), reference))
    for start, token in zip(found["text_offset"], found["tokens"], strict=True):
        assert choice["text"][start:].startswith(token) or token.startswith("bytes:")
    parts = stream(client, "/v1/completions", body)
    assert "".join(part["text"] for part in parts) == choice["text"]
    for field, values in found.items():
        assert [value for part in parts for value in part["logprobs"][field]] == values


def test_logprobs_of_a_chat(service: tuple[TestClient, dict[str | None, Any]]) -> None:
    client, oracles = service
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "wide", "messages": messages, "temperature": 0, "max_tokens": 5, "logprobs": True}
    whole = (
        client.post("/v1/chat/completions", json={**body, "top_logprobs": 2}).raise_for_status().json()["choices"][0]
    )
    tokens, own, best = expected(oracles["wide"], "user: hi assistant: ", 5, 2)
    content = whole["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [name(token) for token in tokens]
    assert [bytes(entry["bytes"]).decode(errors="replace") for entry in content] == [name(token) for token in tokens]
    assert [entry["logprob"] for entry in content] == pytest.approx(own, abs=1e-4)
    for entry, reference in zip(content, best, strict=True):
        assert [top["token"] for top in entry["top_logprobs"]] == [name(token) for token in reference]
    parts = stream(client, "/v1/chat/completions", {**body, "top_logprobs": 2})
    assert [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]] == content
    (plain,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert [entry["top_logprobs"] for entry in plain["logprobs"]["content"]] == [[]] * len(content)
    refused = client.post("/v1/chat/completions", json={**body, "logprobs": False, "top_logprobs": 2})
    assert (refused.status_code, "without logprobs" in refused.text) == (400, True)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_prompt_is_scored_as_evaluation_harnesses_do(
    service: tuple[TestClient, dict[str | None, Any]], count: int
) -> None:
    client, oracles = service
    ids = chat_tokenizer()(PROMPT)["input_ids"]
    body = {
        "model": "small",
        "prompt": [ids, ids[:1]],
        "temperature": 0,
        "max_tokens": count,
        "logprobs": 1,
        "echo": True,
    }
    whole = client.post("/v1/completions", json=body).raise_for_status().json()
    first, single = whole["choices"]
    new, _, _ = expected(oracles["small"], PROMPT, count, 1) if count else ([], [], [])
    rows = scores(oracles["small"], ids + new)
    reference = [float(rows[index][token]) for index, token in enumerate([*ids, *new][1:])]
    found = first["logprobs"]
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(reference, abs=1e-4)
    assert found["top_logprobs"][0] is None
    for row, value, best in zip(found["top_logprobs"][1:], reference, rows.max(-1).values.tolist(), strict=False):
        assert max(row.values()) == pytest.approx(best, abs=1e-4)
        assert min(row.values()) == pytest.approx(value, abs=1e-4)
    assert first["text"].startswith(PROMPT)
    assert "".join(found["tokens"]) == first["text"]
    assert len(single["logprobs"]["tokens"]) == 1 + len(
        expected(oracles["small"], PROMPT[0], count, 1)[0] if count else []
    )
    assert whole["usage"]["prompt_tokens"] == len(ids) + 1
    parts = [part for part in stream(client, "/v1/completions", body) if part["index"] == 0]
    assert [value for part in parts for value in part["logprobs"]["token_logprobs"]] == found["token_logprobs"]
    assert "".join(part["text"] for part in parts) == first["text"]
    if count:  # harnesses count on a score after the prompt, also where the model ends
        ending = client.post("/v1/completions", json={**body, "stop_token_ids": new[:1]}).json()["choices"][0]
        assert (ending["text"], ending["finish_reason"]) == (PROMPT, "stop")
        assert {field: values[: len(ids) + 1] for field, values in found.items()} == ending["logprobs"]


def test_an_echo_without_scores(service: tuple[TestClient, dict[str | None, Any]]) -> None:
    client, _ = service
    body = {"model": "small", "prompt": PROMPT, "temperature": 0, "max_tokens": 3}
    plain = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert client.post("/v1/completions", json={**body, "echo": True}).json()["choices"][0]["text"] == PROMPT + plain
    assert "".join(part["text"] for part in stream(client, "/v1/completions", {**body, "echo": True})) == PROMPT + plain
    (alone,) = client.post("/v1/completions", json={**body, "echo": True, "max_tokens": 0}).json()["choices"]
    assert (alone["text"], alone["finish_reason"]) == (PROMPT, "length")
