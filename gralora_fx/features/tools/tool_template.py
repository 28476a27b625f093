"""Tool support of a tokenizer's chat template, and rewriting of chats for templates without it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gralora_fx.core.loading.text_tokenizer import TextTokenizer
from gralora_fx.features.tools.call_formats import FORMATS, GENERAL, CallFormat
from gralora_fx.service.protocols.openai.messages import with_text

_INSTRUCTIONS = """You can call these tools. Each line has one, with a JSON schema of its arguments:
{tools}
To call one, answer with nothing but its name and arguments in this form:
{example}"""
_UNSAID = {"description": "", "parameters": {"type": "object", "properties": {}}}  # defaults of a function's fields
_EXAMPLE = {"name": "name_of_the_tool", "arguments": {"name_of_an_argument": "its value"}}


@dataclass(frozen=True)
class ToolTemplate:
    """Tool support of a tokenizer's chat template."""

    format: CallFormat
    has_tools: bool  # whether the template describes tools to the model, and writes calls and their results
    is_known: bool  # whether its own call format is in the table
    shown: frozenset[int]  # tokens of the format, kept when texts are decoded without special tokens

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> ToolTemplate:
        """Find the call format of a tokenizer's template."""
        templates = getattr(tokenizer, "chat_template", None) or ""
        if isinstance(templates, dict):  # by their names
            templates = templates.get("tool_use") or templates.get("default") or ""
        text = templates.replace('\\"', '"')
        fits = [known for known in FORMATS if known.fits(text)]
        found = fits[0] if fits else GENERAL
        shown = frozenset(found.special_tokens(tokenizer).values())
        return cls(found, has_tools="tools" in text, is_known=bool(fits), shown=shown)

    def __str__(self) -> str:
        """Return a line for the log."""
        if self.is_known:
            described = "" if self.has_tools else "; a message describes the tools in its place"
            return f"tool calls: {self.format.name}, as the tokenizer's template has them{described}"
        if self.has_tools:
            return "tool calls: JSON, since the form in the tokenizer's template is unknown"
        return "tool calls: JSON, since the tokenizer's template has none; a message describes the tools"

    def messages(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[dict[str, Any]]:
        """Return messages for the template: unchanged, unless it does not support tools."""
        if self.has_tools:
            return [dict(message) for message in messages]
        plain = _plain_messages(messages, self.format)
        return _with_instructions(plain, tools, self.format) if tools else plain


def _plain_messages(messages: Sequence[Mapping[str, Any]], form: CallFormat) -> list[dict[str, Any]]:
    """Rewrite calls as assistant text, and consecutive results as one user message."""
    plain: list[dict[str, Any]] = []
    was_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            text = f"{message['name']}: {message['content']}"
            if was_result:
                plain[-1]["content"] = with_text(plain[-1]["content"], after=f"\n{text}")
            else:
                plain.append({"role": "user", "content": text})
        else:
            calls = [call["function"] for call in message.get("tool_calls", ())]
            written = form.written(calls) if calls else ""
            gap = "\n" if written and message["content"] else ""
            kept = {name: value for name, value in message.items() if name != "tool_calls"}
            plain.append({**kept, "content": with_text(message["content"], after=gap + written)})
        was_result = is_result
    return plain


def attempts(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]]:
    """Yield a chat and its tools unchanged, then in variants for templates that reject that.

    Some templates need every field of a function, and some the arguments of calls as text.
    """
    yield messages, tools
    whole = [{**tool, "function": tool["function"] | _without(_UNSAID, tool["function"])} for tool in tools]
    if whole != [*tools]:
        yield messages, whole
    if any("tool_calls" in message for message in messages):
        yield with_text_arguments(messages), whole


def _without(fields: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def with_text_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose calls have their arguments as JSON text, which some templates concatenate."""
    own = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message.get("tool_calls", ())
        ]
        own.append({**message, **({"tool_calls": calls} if calls else {})})
    return own


def _with_instructions(messages: list[dict[str, Any]], tools: Sequence[Any], form: CallFormat) -> list[dict[str, Any]]:
    """Describe the tools in the system message, else before the first user message."""
    listed = "\n".join(json.dumps(tool["function"]) for tool in tools)
    text = _INSTRUCTIONS.format(tools=listed, example=form.written([_EXAMPLE]))
    first = messages[0]
    if first["role"] == "system":
        return [{**first, "content": with_text(first["content"], after=f"\n\n{text}")}, *messages[1:]]
    if first["role"] == "user":
        return [{**first, "content": with_text(first["content"], before=f"{text}\n\n")}, *messages[1:]]
    return [{"role": "user", "content": text}, *messages]
