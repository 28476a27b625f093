"""Chats as prompts: a tokenizer's template is given, and so writes, what users of transformers give it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from served_exports import CACHED, adapted
from starlette.testclient import TestClient
from tool_tokenizers import FAMILIES, byte_tokenizer

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.text_tokenizer import TextTokenizer
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app

SIZES: dict[str, Any] = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 2048}
# as Qwen's: tools as JSON, calls between tags, results as turns of the user
TURNS = """{% if tools %}<sys>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}</sys>{% endif %}{% for m in messages %}{% if m.role == "tool" %}
{% if loop.first or messages[loop.index0 - 1].role != "tool" %}<user>{% endif %}<tool_response>{{ m.content }}
{% else %}<{{ m.role }}>{% if m.content %}{{ m.content }}{% endif %}{% for call in m.tool_calls %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
TEMPLATES = {"turns": TURNS, **{name: FAMILIES[name][0] for name in ("hermes", "mistral-args", "llama3", "granite")}}
# one that needs every field of a function
DEMANDING = "{% for t in tools %}{{ t.function.name + t.function.description }}{% endfor %}" + FAMILIES["hermes"][0]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Málaga"]}},
    "required": ["city"],
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"description": "Says it.", "name": "say", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop", "description": "Ends all."}},
]
CALLS = [("call_1", "get_weather", {"city": "Rome"}), ("call_2", "say", {"city": "Málaga"})]


def as_sent() -> list[dict[str, Any]]:
    """Return a chat as OpenAI's clients send it."""
    calls = [
        {"id": key, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for key, name, arguments in CALLS
    ]
    results = [{"role": "tool", "tool_call_id": key, "content": f"sunny {key}"} for key, _, _ in CALLS]
    asked = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    return [*asked, {"role": "assistant", "content": None, "tool_calls": calls}, *results]


def as_given() -> list[dict[str, Any]]:
    """Return the same as users of transformers give it to a template."""
    calls = [{"type": "function", "function": {"name": name, "arguments": given}} for _, name, given in CALLS]
    results = [{"role": "tool", "name": name, "content": f"sunny {key}"} for key, name, _ in CALLS]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    return [*asked, {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def as_items() -> list[dict[str, Any]]:
    """Return the same as the input of a response."""
    calls = [
        {"type": "function_call", "call_id": key, "name": name, "arguments": json.dumps(arguments)}
        for key, name, arguments in CALLS
    ]
    results = [{"type": "function_call_output", "call_id": key, "output": f"sunny {key}"} for key, _, _ in CALLS]
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, *calls, *results]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("prompts")
    tokenizer = byte_tokenizer(TURNS, {})
    model, _ = adapted("llama", folder, CACHED, **SIZES, vocab_size=len(tokenizer))
    export_onnx(model, folder / "base", adapters="data", verify=False, tokenizer=tokenizer)
    with TestClient(create_app(ServiceSettings(folder / "base", max_batch=2))) as made:
        yield made


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the texts that are tokenized."""
    texts: list[str] = []
    own = TextTokenizer.__call__
    monkeypatch.setattr(
        TextTokenizer,
        "__call__",
        lambda self, text, **options: (texts.append(text), own(self, text, **options))[1],
    )
    return texts


def ask(client: TestClient, path: str, **fields: Any) -> int:
    """Return how many tokens a prompt has, as the usage says."""
    response = client.post(path, json={"model": "base", **fields})
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    return int(usage.get("prompt_tokens") or usage["input_tokens"])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [[], TOOLS[:1], TOOLS], ids=len)
def test_a_chat_is_written_as_transformers_writes_it(
    client: TestClient, written: list[str], monkeypatch: pytest.MonkeyPatch, template: str, tools: list[Any]
) -> None:
    tokenizer = client.app.state.engine.tokenizer  # type: ignore[attr-defined]
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[template])
    oracle = byte_tokenizer(TEMPLATES[template], {})
    given: Any = {"tools": tools or None, "add_generation_prompt": True}
    expected = oracle.apply_chat_template(as_given(), tokenize=False, **given)
    count = len(oracle.apply_chat_template(as_given(), **given)["input_ids"])
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]
    flat = [{"type": "function", **tool["function"]} for tool in tools]
    written.clear()
    assert ask(client, "/v1/chat/completions", messages=as_sent(), tools=strict, max_tokens=1) == count
    assert ask(client, "/v1/responses", input=as_items(), tools=flat, max_output_tokens=1) == count
    assert written == [expected, expected]


def test_a_template_that_needs_more_gets_it(
    client: TestClient, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field of a function, and where that is not enough arguments as text."""
    tokenizer = client.app.state.engine.tokenizer  # type: ignore[attr-defined]
    monkeypatch.setattr(tokenizer, "chat_template", DEMANDING)
    ask(client, "/v1/chat/completions", messages=as_sent(), tools=TOOLS[:1], max_tokens=1)
    assert written[-1].startswith("get_weather")
    joined = DEMANDING.replace("c.function.arguments | tojson", "c.function.arguments + ''")
    monkeypatch.setattr(tokenizer, "chat_template", joined)
    ask(client, "/v1/chat/completions", messages=as_sent(), tools=TOOLS[:1], max_tokens=1)
    assert '"arguments": {"city": "Rome"}' in written[-1]
