"""Calls of tools in every family's form: random walks through their grammars, read piece by piece, and templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from tool_tokenizers import FAMILIES, byte_tokenizer, family_tokenizer
from transformers.utils.chat_parsing import ResponseParser, parse_response

from gralora_fx.features.structured_outputs.answer_form import AnswerForm
from gralora_fx.features.structured_outputs.grammars import AnswerGrammar, Grammars
from gralora_fx.features.tools.call_formats import FORMATS, GENERAL, CallFormat, CallReader
from gralora_fx.features.tools.tool_fields import Tool, ToolUse, call_grammar
from gralora_fx.features.tools.tool_template import ToolTemplate
from gralora_fx.run.generate.detokenizer import TextStream
from gralora_fx.run.generate.request_errors import WrongFieldError
from gralora_fx.service.protocols.openai.answer_plan import AnswerPart

pytestmark = pytest.mark.quick

FORMS = {form.name: form for form in (*FORMATS, GENERAL)}
NESTED = {"type": "object", "properties": {'a"}': {"enum": ["}]\\", "x"]}}, "required": ['a"}']}
SCHEMAS: dict[str, Any] = {
    "get": {"type": "object", "properties": {"place": {"enum": ["Paris {", '"Rome']}}, "required": ["place"]},
    "get_all": {"type": "object", "properties": {"all": NESTED, "more": {"type": "array", "items": NESTED}}},
    "now": {"type": "object"},
}
END, MOST = 2, 160


def tools() -> tuple[Tool, ...]:
    return tuple(Tool.of(name, schema, f"tools.{name}", Grammars(None)) for name, schema in SCHEMAS.items())


def walk(
    grammar: AnswerGrammar, tokenizer: Any, likely: Sequence[int], seed: int, most: int = MOST
) -> tuple[list[int], bool]:
    """Random tokens of an answer, of which some are likely, and whether it has ended."""
    row, random, ids = grammar.begin(frozenset([END]), most), np.random.default_rng(seed), list[int]()
    while len(ids) < most and not row.is_complete:
        if row.forced:
            ids.append(row.forced.popleft())
            continue
        allowed = np.flatnonzero(row.allowed(len(tokenizer)))
        wanted = [token for token in likely if token in allowed]
        token = int(wanted[0] if wanted and random.random() < 0.2 else random.choice(allowed))
        if token == END:
            return ids, True
        ids.append(token)
        row.take(token)
    return ids, row.is_complete


def read(form: CallFormat, pieces: Sequence[str]) -> tuple[str, dict[int, list[str]], CallReader]:
    """Return the text, and of each call its name and arguments."""
    reader, parts = CallReader(form), list[AnswerPart]()
    for piece in pieces:
        parts += reader.step(piece)
    parts += reader.finish()
    calls: dict[int, list[str]] = {}
    for part in parts:
        if part.name is not None:
            assert part.item == len(calls)
            assert part.id
            calls[part.item] = [part.name, ""]
        elif part.item is not None:
            calls[part.item][1] += part.text
    return "".join(part.text for part in parts if part.item is None), calls, reader


@pytest.mark.parametrize("are_special", [True, False, None])
@pytest.mark.parametrize("name", FORMS)
def test_random_answers_are_text_and_valid_calls(name: str, are_special: bool | None) -> None:
    """Whatever the marks are: special tokens, other tokens, or letters."""
    form = FORMS[name]
    marks = {"hermes": ("<tool_call>", "</tool_call>"), "llama3": ("<|python_tag|>",), "granite": ("<|tool_call|>",)}
    own = marks.get(name, ("[TOOL_CALLS]", "[ARGS]") if "mistral" in name else ())
    if name == "deepseek":
        if are_special is None:
            pytest.skip("its marks have letters that the tokenizer lacks")
        own = tuple(part for part in form.start.replace("><", "> <").split(" "))
        own += (form.middle, form.tail, form.end)
    tokens = {} if are_special is None else {**dict.fromkeys(own, are_special), "<think>": False}
    tokenizer = byte_tokenizer("", tokens)
    likely = [tokenizer.convert_tokens_to_ids(form.trigger)] if form.trigger in tokens else []
    shown = frozenset(form.special_tokens(tokenizer).values())
    grammars, seen = Grammars(tokenizer), 0
    for is_required, is_parallel in ((True, True), (True, False), (False, True)):
        grammar = call_grammar(grammars, form, ToolUse(tools(), is_required, is_parallel))
        for seed in range(4):
            ids, has_ended = walk(grammar, tokenizer, likely, seed)
            stream = TextStream(tokenizer, shown)
            pieces = [stream.step(token) for token in ids] + [stream.finish()]
            text, calls, reader = read(form, pieces)
            assert (text, calls) == read(form, ["".join(pieces)])[:2]
            assert (text, calls) == read(form, "".join(pieces))[:2]
            if is_required:
                assert not text or not has_ended
                assert calls or not has_ended
            if not is_parallel or form.between is None:
                assert len(calls) <= 1
            if not has_ended and calls and not reader.is_whole:
                calls.popitem()
            for called, arguments in calls.values():
                jsonschema.validate(json.loads(arguments), SCHEMAS[called])
            seen += len(calls)
    assert seen


def test_text_that_looks_like_a_call() -> None:
    hermes, llama = FORMS["hermes"], FORMS["llama3"]
    assert read(hermes, "a <tool <tool_cal> b <tool")[0] == "a <tool <tool_cal> b <tool"
    assert read(llama, '{"nam": 1} {"name": 2}')[:2] == ('{"nam": 1} {"name": 2}', {})
    assert read(llama, '{"na')[:2] == ('{"na', {})
    call = '<|python_tag|>{"name": "a", "parameters": {"b": ["}", {}]}}'
    assert read(llama, call)[:2] == ("", {0: ["a", '{"b": ["}", {}]}']})


REGIONS: dict[str, dict[str, Any]] = {  # of calls, as transformers' templates of responses have them
    "hermes": {"open": "<tool_call>\n", "close": "\n</tool_call>"},
    "mistral": {"open": "[TOOL_CALLS]"},
    "granite": {"open": "<|tool_call|>"},
    "mistral-args": {"open_pattern": r"\[TOOL_CALLS\](?P<name>.*?)\[ARGS\]", "close_pattern": r"(?=\[TOOL_CALLS\])|\Z"},
    "deepseek": {"open_pattern": "{trigger}{between}(?P<name>.*?){middle}", "close": FORMS["deepseek"].tail},
    "llama3": {"open_pattern": r'\A(?:<\|python_tag\|>)?(?=\{"name")'},
    "json": {"open_pattern": r'\A(?=\[\{"name")'},
}


@pytest.mark.parametrize("name", FORMS)
def test_transformers_parser_tells_no_call_before_its_end(name: str) -> None:
    """Calls are read here because its parser tells neither a call whose name alone is there nor one that is cut."""
    form, call = FORMS[name], {"name": "get", "arguments": {"place": "Paris"}}
    field = {**REGIONS[name], "content": "json", "repeats": name not in ("llama3", "json", "mistral", "granite")}
    if "?P<name>" in field.get("open_pattern", ""):
        field["open_pattern"] = field["open_pattern"].format(**vars(form))
        field["transform"] = {"name": "{name}", "arguments": "{content}"}
    template = {"start_anchor": "<begin>", "fields": {"content": {}, "calls": field}}
    text = form.written([call])
    assert parse_response(text, template, prefix="")["calls"]  # the whole is read
    parser, beginning = ResponseParser(template, prefix=""), text[: text.index("Paris")]
    events = [event for letter in beginning for event in parser.feed(letter)]
    assert [event["type"] for event in events].count("region_open") == 1
    assert not any("value" in event for event in events if event["field"] == "calls")
    with pytest.raises(ValueError, match="could not parse region"):
        parser.finalize()
    assert read(form, beginning)[1] == {0: ["get", '{"place": "']}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_tells_its_family(family: str) -> None:
    tokenizer = family_tokenizer(family)
    found = ToolTemplate.of(tokenizer)
    assert found.format.name == family
    assert found.is_known is found.has_tools is (family != "json")
    assert family in str(found).lower()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": tokenizer.chat_template}
    assert ToolTemplate.of(tokenizer).format == found.format


def test_a_template_without_json_is_said_to_be_unknown() -> None:
    qwen = "{% if tools %}<tool_call>\n<function={{ tools }}>{% endif %}<tool_call> arguments"
    found = ToolTemplate.of(byte_tokenizer(qwen, {}))
    assert (found.format, found.has_tools, found.is_known) == (GENERAL, True, False)
    assert "form in the tokenizer's template is unknown" in str(found)


def test_a_chat_for_a_template_that_knows_no_tools() -> None:
    template = ToolTemplate.of(family_tokenizer("json"))
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": {"place": "x"}}}
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Wait.", "tool_calls": [call, call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1", "name": "get"},
        {"role": "tool", "content": "wet", "tool_call_id": "1", "name": "get"},
    ]
    own = [{"type": "function", "function": {"name": "get", "parameters": SCHEMAS["get"]}}]
    first, second, third = template.messages(chat, own)
    assert first["role"] == "user"
    assert json.dumps(own[0]["function"]) in first["content"]
    assert first["content"].endswith("\n\nHi")
    assert '\n[{"name": "name_of_the_tool"' in first["content"]
    assert read(GENERAL, second["content"].removeprefix("Wait.\n"))[1] == {n: ["get", '{"place": "x"}'] for n in (0, 1)}
    assert third == {"role": "user", "content": "get: sunny\nget: wet"}
    system = {"role": "system", "content": "Be kind."}
    assert template.messages([system, *chat], own)[0]["content"].startswith("Be kind.\n\n")
    assert template.messages(chat, [])[0] == chat[0]


def test_a_form_beside_tools() -> None:
    """The answer is in its form, or calls; calls without a mark cannot be told from it."""
    tokenizer = family_tokenizer("mistral")
    form, grammars = FORMS["mistral"], Grammars(tokenizer)
    content = AnswerForm.of("choice", ["yes", "no"], "response_format")
    grammar = call_grammar(grammars, form, ToolUse(tools(), False, True), content)
    likely = [tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")]
    stream, texts = TextStream(tokenizer, frozenset(likely)), set()
    for seed in range(12):
        ids, _ = walk(grammar, tokenizer, likely, seed)
        text, calls, _ = read(form, [TextStream(tokenizer, frozenset(likely)).step(token) for token in ids])
        texts.add("a call" if calls else text)
    assert stream.finish() == ""
    assert texts == {"a call", "yes", "no"}
    with pytest.raises(WrongFieldError, match="response_format: it cannot be combined with tools"):
        call_grammar(grammars, GENERAL, ToolUse(tools(), False, True), content)


def listed(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


TEXT = {"type": "string", "description": "Some text, such as 'San Francisco, CA' or \"none\"."}
NUMBER = {"type": "number", "format": "float", "description": "This is a float type value.", "default": 0.5}
# in the style of function-calling benchmarks: descriptions, defaults, enums, nested objects, lists of lists
STYLES: dict[str, dict[str, Any]] = {
    "math_triangle_area": {
        "base": {"type": "integer"},
        "height": {"type": "integer"},
        "unit": {**TEXT, "default": "m"},
    },
    "hotel.book": {
        "location": TEXT,
        "stay": {
            "type": "object",
            "properties": {"nights": {"type": "integer", "minimum": 1}, "room": {"type": "string", "enum": ["a", "b"]}},
            "required": ["nights"],
        },
        "guests": listed(TEXT, minItems=1, maxItems=3),
    },
    "matrix-multiply": {"left": listed(listed(NUMBER)), "right": listed(listed(NUMBER))},
    "db_query": {
        "conditions": listed(
            {
                "type": "object",
                "properties": {"field": TEXT, "operation": {"type": "string", "enum": ["<", ">", "=", ">=", "<="]}},
                "required": ["field", "operation"],
            },
        ),
        "table": {"type": "string", "enum": ["users", "caf\u00e9"]},
    },
    "set_options": {
        "options": {"type": "object", "additionalProperties": {"type": "boolean"}},
        "on": {"type": "boolean"},
    },
    "anything": {"value": {"description": "Whatever comes to mind."}, "date": {"type": "string", "format": "date"}},
    "choose": {"kind": {"type": ["string", "null"]}, "level": {"enum": [1, 2.5, None, "high"]}},
    "now": {},
}


@pytest.mark.parametrize("name", STYLES)
def test_random_calls_meet_schemas_of_many_styles(name: str) -> None:
    tokenizer = family_tokenizer("mistral")
    properties = STYLES[name]
    schema = {"type": "object", "properties": properties, "required": list(properties)[:2]}
    grammars, form = Grammars(tokenizer), FORMS["mistral"]
    grammar = call_grammar(grammars, form, ToolUse((Tool.of(name, schema, "tools.0", grammars),), True, False))
    likely = tokenizer.convert_tokens_to_ids(['"', "]", "}"])  # so that no text is long
    whole = 0
    for seed in range(6):
        ids, has_ended = walk(grammar, tokenizer, likely, seed, most=900)
        stream = TextStream(tokenizer, frozenset(form.special_tokens(tokenizer).values()))
        _, calls, _ = read(form, [*map(stream.step, ids), stream.finish()])
        if has_ended:
            whole += 1
            assert calls[0][0] == name
            jsonschema.validate(json.loads(calls[0][1]), {**schema, "additionalProperties": False})
    assert whole
