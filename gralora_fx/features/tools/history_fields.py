"""Calls of tools and their results in the history of a chat, as clients send them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from gralora_fx.run.generate.request_errors import WrongFieldError
from gralora_fx.service.protocols.openai.messages import History, InputText, ItemFields, MessageFields, joined
from gralora_fx.service.protocols.openai.strict_model import Idle, ListOf, StrictModel, wrong_field


class CalledFunction(StrictModel):
    """What a call of the history called."""

    name: str
    arguments: str


class ToolCall(StrictModel):
    """A call of the history."""

    without_effect: ClassVar[Idle] = {"index": None}

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CalledMessageFields(MessageFields):
    """A message of a chat: what was said, calls of an assistant, or the result of one."""

    without_effect: ClassVar[Idle] = {"tool_calls": ([],)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: ListOf[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> CalledMessageFields:
        if self.content is None and self.tool_calls is None:
            raise wrong_field("content", "missing", "it is missing")
        if self.tool_calls is not None and self.role != "assistant":
            raise wrong_field("tool_calls", "role", f"a message of the role {self.role} has none; leave it out")
        if self.role == "tool" and self.tool_call_id is None:
            raise wrong_field("tool_call_id", "missing", "it is missing")
        if self.role != "tool" and self.tool_call_id is not None:
            raise wrong_field("tool_call_id", "role", f"a message of the role {self.role} has none; leave it out")
        return self

    def add_to(self, history: History, field: str) -> None:
        """Add it to a chat."""
        if self.tool_call_id is not None:
            add_result(history, self.tool_call_id, self.text, f"{field}.tool_call_id")
            return
        super().add_to(history, field)
        for index, call in enumerate(self.tool_calls or ()):
            where = f"{field}.tool_calls.{index}.function.arguments"
            add_call(history, call.id, call.function.name, call.function.arguments, where)


class CallItemFields(ItemFields):
    """An item of a response's input: a message, a call of a tool, or the result of one."""

    needed: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "message": ("role", "content"),
        "function_call": ("call_id", "name", "arguments"),
        "function_call_output": ("call_id", "output"),
    }

    type: Literal["message", "function_call", "function_call_output", "item_reference"] = "message"
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | ListOf[InputText] | None = None

    def add_to(self, history: History, field: str) -> None:
        """Add it to a chat."""
        if self.type == "function_call":
            add_call(history, str(self.call_id), str(self.name), str(self.arguments), f"{field}.arguments")
        elif self.type == "function_call_output":
            add_result(history, str(self.call_id), joined(self.output), f"{field}.call_id")
        else:
            super().add_to(history, field)


def add_call(history: History, key: str, name: str, arguments: str, field: str) -> None:
    """Add a call to the assistant's message, which is new unless it is the last one."""
    try:
        given = json.loads(arguments or "{}", parse_constant=_refused)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise WrongFieldError(field, "it is not a JSON object; send a whole call as the answer had it")
    if not history.messages or history.messages[-1]["role"] != "assistant":
        history.say("assistant", "")
    function = {"name": name, "arguments": given}
    history.messages[-1].setdefault("tool_calls", []).append({"id": key, "type": "function", "function": function})
    history.names[key] = name


def add_result(history: History, key: str, text: str, field: str) -> None:
    """Add the result of a call."""
    if key not in history.names:
        raise WrongFieldError(field, "no call before it has this id; give the id of one")
    history.messages.append({"role": "tool", "content": text, "tool_call_id": key, "name": history.names[key]})


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
