"""`/v1/responses` with the official client: text, forms, calls and their results, events, scores, refusals."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response as ClientResponse
from pydantic import BaseModel, Field
from running_service import running
from served_exports import CACHED, adapted
from starlette.testclient import TestClient
from tool_tokenizers import family_tokenizer

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.run.generate.request_errors import DeadEndError
from gralora_fx.serving import Decoder

SIZES: dict[str, Any] = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 1024}
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "name": "get", "description": "Weather", "parameters": CITY, "strict": True}]
BASE = "base"
GREEDY: dict[str, Any] = {"extra_body": {"seed": 1, "top_k": 1}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    folder, tokenizer = tmp_path_factory.mktemp("responses"), family_tokenizer("hermes")
    model, _ = adapted("llama", folder, CACHED, **SIZES, vocab_size=len(tokenizer))
    export_onnx(model, folder / BASE, adapters="data", verify=False, tokenizer=tokenizer)
    with running(ServiceSettings(folder / BASE, max_batch=4, max_queue=16)) as served:
        yield served


class Pet(BaseModel):
    """A record as which an answer is read."""

    model_config = {"extra": "forbid"}

    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)


def test_text_is_that_of_a_chat(client: openai.OpenAI) -> None:
    chat: Any = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    for model in (BASE, "wide"):
        expected = client.chat.completions.create(model=model, messages=chat, max_tokens=9, **GREEDY)
        found = client.responses.create(model=model, instructions="a", input="b", max_output_tokens=9, **GREEDY)
        assert found.output_text == expected.choices[0].message.content
        assert found.usage.input_tokens == expected.usage.prompt_tokens
        assert found.usage.output_tokens == expected.usage.completion_tokens == 9
        assert found.usage.total_tokens == expected.usage.total_tokens
        assert 0 < found.usage.input_tokens_details.cached_tokens < found.usage.input_tokens  # which the chat has read
        assert found.usage.output_tokens_details.reasoning_tokens == 0
        assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (found.output[0].status, found.store) == ("incomplete", False)
        given: Any = [{"role": "developer", "content": [{"type": "input_text", "text": "a"}]}]
        given += [{"type": "message", "role": "user", "content": "b"}]
        again = client.responses.create(model=model, input=given, max_output_tokens=9, store=False, **GREEDY)
        assert again.output_text == found.output_text
    stopped = client.responses.create(model=BASE, input="b", extra_body={"stop": list("abcdefghijklm!?.")})
    assert (stopped.status, stopped.output[0].status, stopped.incomplete_details) == ("completed", "completed", None)
    assert stopped.completed_at >= stopped.created_at


def test_the_events_of_text_are_in_their_order(client: openai.OpenAI) -> None:
    options: Any = {"model": "small", "input": "b", "max_output_tokens": 7, "metadata": {"a": "b"}, **GREEDY}
    options |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [kind.removeprefix("response.") for kind, _ in itertools.groupby(event.type for event in events)]
    opened = ["created", "in_progress", "output_item.added", "content_part.added"]
    closed = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds == [*opened, "output_text.delta", *closed]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    (content,) = whole.output[0].content
    assert "".join(event.delta for event in deltas) == content.text
    assert len(content.logprobs) == 7
    assert all(len(token.top_logprobs) == 2 for token in content.logprobs)
    tokens = [token for event in deltas for token in event.logprobs]
    assert [(t.token, t.logprob) for t in tokens] == [(t.token, t.logprob) for t in content.logprobs]
    last: ClientResponse = events[-1].response
    assert (last.output_text, last.metadata) == (content.text, {"a": "b"})
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert {event.item_id for event in deltas} == {last.output[0].id}


def test_forms_and_parsed_answers(client: openai.OpenAI) -> None:
    for seed in range(3):
        found = client.responses.parse(model="wide", input="b", text_format=Pet, extra_body={"seed": seed})
        assert isinstance(found.output_parsed, Pet)
    loose: Any = {"format": {"type": "json_object"}, "verbosity": "medium"}
    found = client.responses.create(model=BASE, input="b", text=loose, max_output_tokens=900, extra_body={"seed": 2})
    assert found.output_text.startswith("{")
    assert found.text.format.type == "json_object"
    with client.responses.stream(model=BASE, input="b", text_format=Pet, extra_body={"seed": 2}) as stream:
        list(stream)
        assert isinstance(stream.get_final_response().output_parsed, Pet)


def test_calls_and_their_results(client: openai.OpenAI) -> None:
    options: Any = {"model": BASE, "tools": TOOLS, "parallel_tool_calls": False, **GREEDY}
    found = client.responses.create(**options, input="b", tool_choice="required")
    (call,) = found.output
    assert (call.type, call.name, call.status) == ("function_call", "get", "completed")
    assert json.loads(call.arguments)["city"] in ("Rome", "Paris")
    assert found.tools[0].parameters == CITY
    assert (found.tool_choice, found.parallel_tool_calls) == ("required", False)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "wet"}
    history: Any = [{"role": "user", "content": "b"}, call.model_dump(exclude_none=True), result]
    again = client.responses.create(**options, input=history, tool_choice="none", max_output_tokens=3)
    assert again.output[0].type == "message"
    chat: Any = [
        {"role": "user", "content": "b"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "x", "type": "function", "function": {"name": "get", "arguments": call.arguments}}],
        },
        {"role": "tool", "tool_call_id": "x", "content": "wet"},
    ]
    same = client.chat.completions.create(model=BASE, messages=chat, max_tokens=3, **GREEDY)
    assert again.output_text == same.choices[0].message.content
    only: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get"}]}
    assert client.responses.create(**options, input="b", tool_choice=only).output[0].name == "get"
    cut = client.responses.create(**options, input="b", tool_choice="required", max_output_tokens=36)
    assert (cut.status, cut.output[0].status) == ("incomplete", "incomplete")
    assert call.arguments.startswith(cut.output[0].arguments)


def test_text_before_calls(client: openai.OpenAI) -> None:
    """An item for the text, and one for each call."""
    token = str(family_tokenizer("hermes").convert_tokens_to_ids("<tool_call>"))
    options: Any = {"model": BASE, "input": "b", "tools": TOOLS, "max_output_tokens": 700}
    kinds = set()
    for seed in range(6):
        more = {"extra_body": {"seed": seed, "logit_bias": {token: 4}}}
        found = client.responses.create(**options, **more)
        kinds |= {item.type for item in found.output}
        events = list(client.responses.create(**options, **more, stream=True))
        last = events[-1].response
        for one, other in zip(found.output, last.output, strict=True):
            assert (one.type, one.status) == (other.type, other.status)
            if one.type == "function_call":
                assert (one.name, one.arguments) == (other.name, other.arguments)
            else:
                assert one.content[0].text == other.content[0].text
        added = [event.output_index for event in events if event.type == "response.output_item.added"]
        assert added == list(range(len(last.output)))
        done = [event.item for event in events if event.type == "response.output_item.done"]
        assert done == last.output
    assert kinds == {"message", "function_call"}


@pytest.mark.parametrize(
    ("problem", "code"), [(ValueError("x"), "server_error"), (DeadEndError(None, "stuck"), "invalid_prompt")]
)
def test_a_stream_that_fails(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, problem: Exception, code: str
) -> None:
    step, steps = Decoder.step, itertools.count()

    def failing(*given: Any) -> Any:
        if next(steps) > 3:
            raise problem
        return step(*given)

    monkeypatch.setattr(Decoder, "step", failing)
    *_, last = client.responses.create(model=BASE, input="b", stream=True, extra_body={"ignore_eos": True})
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", code)
    assert all(item.status == "incomplete" for item in last.response.output)


BAD: dict[str, tuple[dict[str, Any], str | None]] = {
    "previous": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "background": ({"background": True}, "background"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
    "prompt": ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "reasoning": ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    "include": ({"include": ["output_text.annotations"]}, "include.0"),
    "messages": ({"messages": []}, "messages"),
    "no input": ({"input": None}, "input"),
    "item": ({"input": [{"type": "reasoning", "summary": []}]}, "input.0.type"),
    "reference": ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
    "role": ({"input": [{"content": "a"}]}, "input.0.role"),
    "image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.image_url"),
    "result": ({"input": [{"type": "function_call_output", "call_id": "1", "output": "a"}]}, "input.0.call_id"),
    "arguments": (
        {"input": [{"type": "function_call", "call_id": "1", "name": "get", "arguments": "{"}]},
        "input.0.arguments",
    ),
    "member": ({"input": [{"role": "user", "content": "a", "output": "b"}]}, "input.0.output"),
    "tool": ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    "schema": ({"tools": [{"type": "function", "name": "a", "parameters": {"foo": 1}}]}, "tools.0.parameters"),
    "choice": ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "zzz"}}, "tool_choice.name"),
    "format": ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    "form": ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"x": 1}}}}, "text.format.schema"),
    "verbosity": ({"text": {"verbosity": "low"}}, "text.verbosity"),
    "response_format": ({"response_format": {"type": "text"}}, "response_format"),
    "tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "scores": ({"top_logprobs": 2}, "top_logprobs"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_names_its_field(http: TestClient, name: str) -> None:
    fields, field = BAD[name]
    response = http.post("/v1/responses", json={"model": BASE, "input": "b", "max_output_tokens": 4, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert len(error["message"]) < 600
