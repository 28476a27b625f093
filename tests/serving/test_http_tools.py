"""Tools over HTTP with the official client: forced, chosen and refused calls, streams, histories, cut answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import llm_comply
import openai
import pytest
from llm_comply.config import ComplianceConfig
from llm_comply.runner import TestRunner as ComplianceRunner
from llm_comply.schema import SpecLoader
from llm_comply.tests.open_responses import OPEN_RESPONSES_TESTS
from llm_comply.tests.openai_chat import OPENAI_CHAT_TESTS
from pydantic import BaseModel
from running_service import running
from served_exports import CACHED, adapted
from starlette.testclient import TestClient
from tool_tokenizers import family_tokenizer

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx

SIZES: dict[str, Any] = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 2048}
SCHEMAS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city"],
    },
    "get": {"type": "object", "properties": {}},
    "search": {"type": "object", "properties": {"text": {"type": "string", "maxLength": 5}}, "required": ["text"]},
}
TOOLS: Any = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in SCHEMAS.items()]
CHAT: Any = [{"role": "user", "content": "Weather?"}]
BASE = "base"


OPENING = "[TOOL_CALLS]"


@pytest.fixture(scope="module", params=["mistral", "json"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def service(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    folder = tmp_path_factory.mktemp(family)
    tokenizer = family_tokenizer(family)
    model, _ = adapted("llama", folder, CACHED, **SIZES, vocab_size=len(tokenizer))
    export_onnx(model, folder / BASE, adapters="data", verify=False, tokenizer=tokenizer)
    with running(ServiceSettings(folder / BASE, max_batch=4, max_queue=16)) as served:
        yield served


def check(calls: Any) -> None:
    """Check that calls are of the tools, and meet their schemas."""
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, {**SCHEMAS[call.function.name], "additionalProperties": False})


def streamed(chunks: Any) -> tuple[dict[int, str], dict[int, list[Any]], dict[int, str]]:
    """Return the text, the calls (id, name, arguments) and the ending of each choice of a stream."""
    texts: dict[int, str] = {}
    calls: dict[int, list[Any]] = {}
    endings: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            own = calls.setdefault(choice.index, [])
            for delta in choice.delta.tool_calls or ():
                assert delta.index <= len(own)
                if delta.index == len(own):
                    assert delta.id
                    own.append([delta.id, delta.function.name, ""])
                else:
                    assert delta.id is None
                    assert delta.function.name is None
                own[delta.index][2] += delta.function.arguments
            endings[choice.index] = choice.finish_reason or endings.get(choice.index, "")
    return texts, calls, endings


def test_a_required_call_meets_its_schema_in_every_row(client: openai.OpenAI, family: str) -> None:
    for model in (BASE, "small", "wide"):
        options: Any = {"model": model, "messages": CHAT, "tools": TOOLS, "seed": 3, "n": 3, "max_tokens": 900}
        found = client.chat.completions.create(**options, tool_choice="required", temperature=1.5)
        for choice in found.choices:
            assert choice.message.content is None
            assert choice.message.tool_calls
            if choice.finish_reason == "tool_calls":
                check(choice.message.tool_calls)
        again = streamed(
            client.chat.completions.create(**options, tool_choice="required", temperature=1.5, stream=True)
        )
        for choice in found.choices:
            assert again[0][choice.index] == ""
            calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls]
            assert [call[1:] for call in again[1][choice.index]] == calls
            assert again[2][choice.index] == choice.finish_reason


def test_named_and_allowed_tools(client: openai.OpenAI, family: str) -> None:
    def names(choice: Any, **more: Any) -> list[list[str]]:
        options: Any = {"model": "wide", "messages": CHAT, "tools": TOOLS, "max_tokens": 900, "n": 4, "seed": 1}
        found = client.chat.completions.create(**options, tool_choice=choice, temperature=2, **more)
        return [[call.function.name for call in one.message.tool_calls or ()] for one in found.choices]

    assert names({"type": "function", "function": {"name": "get"}}) == [["get"]] * 4
    some = [{"type": "function", "function": {"name": name}} for name in ("get", "search")]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": some}}
    assert {name for one in names(allowed) for name in one} == {"get", "search"}
    assert all(len(one) == 1 for one in names("required", parallel_tool_calls=False))
    assert names("none") == [[]] * 4


def test_text_until_the_model_begins_a_call(client: openai.OpenAI, family: str) -> None:
    """A bias makes the beginning of a call likely, or certain."""
    options: Any = {"model": BASE, "messages": CHAT, "tools": TOOLS, "max_tokens": 300, "seed": 2}
    plain = client.chat.completions.create(**options, temperature=0).choices[0]
    assert plain.finish_reason in ("stop", "length")
    assert plain.message.tool_calls is None
    if family == "json":  # calls have no mark: they begin the answer, or there are none
        return
    token = str(family_tokenizer(family).convert_tokens_to_ids(OPENING))
    called = client.chat.completions.create(**options, temperature=0, logit_bias={token: 100}).choices[0]
    assert called.message.content is None
    assert called.message.tool_calls
    options |= {"temperature": 1, "logit_bias": {token: 4}, "n": 4}
    found = client.chat.completions.create(**options).choices
    assert any(one.message.content and one.message.tool_calls for one in found)
    texts, calls, endings = streamed(client.chat.completions.create(**options, stream=True))
    for one in found:
        own = [[call.function.name, call.function.arguments] for call in one.message.tool_calls or ()]
        assert [call[1:] for call in calls[one.index]] == own
        assert texts[one.index] == (one.message.content or "")
        assert endings[one.index] == one.finish_reason
        assert OPENING not in texts[one.index]
        if one.finish_reason == "tool_calls":
            check(one.message.tool_calls)


def test_calls_that_are_cut(client: openai.OpenAI, family: str) -> None:
    """By the most tokens within the name or the arguments, and by a stop string."""
    schema = {"type": "object", "properties": {"text": {"type": "string", "minLength": 60}}, "required": ["text"]}
    tool: Any = {"type": "function", "function": {"name": "search", "parameters": schema}}
    options: Any = {"model": BASE, "messages": CHAT, "tools": [tool], "tool_choice": "required", "temperature": 0}
    early = client.chat.completions.create(**options, max_tokens=12).choices[0]
    assert (early.message.tool_calls, early.message.content) == (None, "")
    assert early.finish_reason == "length"
    cut = client.chat.completions.create(**options, max_tokens=75).choices[0]
    assert cut.finish_reason == "length"
    assert cut.message.tool_calls[0].function.arguments.startswith('{"text": "')
    stopped = client.chat.completions.create(**options, max_tokens=900, stop='xt": "').choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.tool_calls[0].function.arguments == '{"te'
    scored = client.chat.completions.create(**options, max_tokens=75, logprobs=True, top_logprobs=1)
    assert scored.choices[0].message.tool_calls[0].function == cut.message.tool_calls[0].function
    assert len(scored.choices[0].logprobs.content) == 75 == scored.usage.completion_tokens


def test_results_go_back_to_the_model(client: openai.OpenAI, http: TestClient, family: str) -> None:
    options: Any = {"model": BASE, "tools": TOOLS, "temperature": 0, "max_tokens": 900}
    called = client.chat.completions.create(messages=CHAT, tool_choice="required", parallel_tool_calls=False, **options)
    called = called.choices[0].message
    first = called.tool_calls[0]
    result = {"role": "tool", "tool_call_id": first.id, "content": [{"type": "text", "text": "sunny"}]}
    options["max_tokens"] = 4
    again = client.chat.completions.create(messages=[*CHAT, called.model_dump(), result], **options)
    shorter = client.chat.completions.create(messages=[*CHAT, {"role": "assistant", "content": "."}], **options)
    assert again.usage.prompt_tokens > shorter.usage.prompt_tokens + len("sunny")
    half = called.model_dump()
    half["tool_calls"][0]["function"]["arguments"] = '{"city'
    for messages, field in (
        ([*CHAT, half], "messages.1.tool_calls.0.function.arguments"),
        ([*CHAT, {**result, "tool_call_id": "zzz"}], "messages.1.tool_call_id"),
        ([*CHAT, {"role": "tool", "content": "a"}], "messages.1.tool_call_id"),
        ([*CHAT, {"role": "assistant"}], "messages.1.content"),
        ([{"role": "user", "content": "a", "tool_call_id": "a"}], "messages.0.tool_call_id"),
    ):
        response = http.post("/v1/chat/completions", json={"model": BASE, "messages": messages})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field


class Weather(BaseModel):
    """A record of which the official client makes a tool."""

    model_config = {"extra": "forbid"}

    city: Literal["Paris", "Rome"]
    celsius: bool


def test_the_official_client_parses_calls(client: openai.OpenAI, family: str) -> None:
    tool = openai.pydantic_function_tool(Weather)
    options: Any = {"model": "wide", "messages": CHAT, "tools": [tool], "tool_choice": "required", "seed": 4}
    found = client.chat.completions.parse(**options, max_tokens=1000).choices[0]
    assert all(isinstance(call.function.parsed_arguments, Weather) for call in found.message.tool_calls)
    chosen: Any = {"type": "function", "name": "Weather"}
    own: Any = [{"type": "function", **tool["function"]}]
    with client.responses.stream(
        model="wide", input="Weather?", tools=own, tool_choice=chosen, extra_body={"seed": 4}
    ) as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    (call,) = response.output
    assert isinstance(Weather.model_validate(call.parsed_arguments), Weather)
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert set(kinds[3:-3]) == {"response.function_call_arguments.delta"}
    done = ["response.function_call_arguments.done", "response.output_item.done", "response.completed"]
    assert kinds[-3:] == done
    assert response.status == call.status == "completed"


def test_the_compliance_tests_of_tools_pass(service: tuple[str, Any], family: str) -> None:
    config = ComplianceConfig(f"{service[0]}v1", "none", model=BASE, verbose=True)
    for tests, spec in ((OPENAI_CHAT_TESTS, "openai_chat.json"), (OPEN_RESPONSES_TESTS, "openresponses.json")):
        (own,) = (test for test in tests if test.id.endswith("tool-calling"))
        loaded = SpecLoader(str(Path(llm_comply.__file__).parent / "specs" / spec))
        (result,) = ComplianceRunner(config, [own], loaded).run_all().results
        assert result.status.value == "passed", result
        assert not result.warnings


def deep(levels: int) -> dict[str, Any]:
    """Return a schema within schemas."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def with_parameters(parameters: Any) -> dict[str, Any]:
    return {"tools": [*TOOLS, {"type": "function", "function": {"name": "bad", "parameters": parameters}}]}


LAST = "tools.3.function.parameters"
BAD: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no schema": (with_parameters("nothing"), LAST, "dictionary"),
    "a schema that is none": (with_parameters({"type": "object", "properties": 3}), LAST, ""),
    "not an object's": (with_parameters({"type": "array"}), LAST, "the arguments of a function are an object"),
    "unknown keyword": (with_parameters({"type": "object", "foo": 1}), LAST, "the keyword 'foo'"),
    "keyword within": (
        with_parameters({"properties": {"a": {"type": "array", "uniqueItems": True}}}),
        LAST,
        "the keyword 'uniqueItems'",
    ),
    "remote": (with_parameters({"properties": {"a": {"$ref": "https://a/b"}}}), LAST, "only what is within"),
    "endless": (
        with_parameters({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        LAST,
        "without end",
    ),
    "10 MB": (with_parameters({"properties": {"a": {"enum": ["x" * 10_000_000]}}}), LAST, "larger than 64 KiB"),
    "no token": (
        {
            **with_parameters({"properties": {"a": {"enum": ["\u4e2d"]}}, "required": ["a"]}),
            "tool_choice": {"type": "function", "function": {"name": "bad"}},
        },
        "tools",
        "no token continues the answer's grammar",
    ),
    "a type": (with_parameters({"properties": {"a": {"type": "dict"}}}), LAST, ""),
    "too deep": (with_parameters(deep(400)), LAST, ""),
    "unknown name": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "zzz"}}},
        "tool_choice.function.name",
        "no tool is called 'zzz'",
    ),
    "unknown allowed": (
        {
            "tools": TOOLS,
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "zzz"}}]},
            },
        },
        "tool_choice.allowed_tools.tools.0.function.name",
        "no tool is called",
    ),
    "no tools": ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    "a choice": ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "'none', 'auto' or 'required'"),
    "name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
    "twice": ({"tools": [*TOOLS, TOOLS[1]]}, "tools.3.function.name", "another tool"),
    "kind": ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools.0.type", "'function'"),
    "many": ({"tools": TOOLS * 50}, "tools", "at most 128"),
    "field": ({"tools": [{"type": "function", "function": {"name": "a", "zzz": 1}}]}, "tools.0.function.zzz", ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tools_name_their_field(http: TestClient, family: str, name: str) -> None:
    if family != "json" and name not in ("unknown keyword", "no token"):
        pytest.skip("once is enough")
    fields, field, message = BAD[name]
    response = http.post("/v1/chat/completions", json={"model": BASE, "messages": CHAT, "max_tokens": 90, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert message in error["message"]
    assert len(error["message"]) < 600
