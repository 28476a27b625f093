"""The messages of a chat as OpenAI's clients send them, calls of tools and their results among them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from gralora_fx.run.generate.answer_form import FormError
from gralora_fx.service.protocols.openai.idle_fields import MESSAGE, TEXT_PART, TOOL_CALL, Idle
from gralora_fx.service.protocols.openai.strict_model import ListOf, StrictModel, wrong_field


class TextPart(StrictModel):
    """A part of a message."""

    without_effect: ClassVar[Idle] = TEXT_PART

    type: Literal["text"]
    text: str


class CalledFunction(StrictModel):
    """What a call of the history called."""

    name: str
    arguments: str


class ToolCall(StrictModel):
    """A call of the history."""

    without_effect: ClassVar[Idle] = TOOL_CALL

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(StrictModel):
    """A message of a chat: what was said, calls of an assistant, or the result of one."""

    without_effect: ClassVar[Idle] = MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[TextPart] | None = None
    name: str | None = None
    tool_calls: ListOf[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> ChatMessage:
        if self.content is None and self.tool_calls is None:
            raise wrong_field("content", "missing", "it is missing")
        if self.tool_calls is not None and self.role != "assistant":
            raise wrong_field("tool_calls", "role", f"a message of the role {self.role} has none; leave it out")
        if self.role == "tool" and self.tool_call_id is None:
            raise wrong_field("tool_call_id", "missing", "it is missing")
        if self.role != "tool" and self.tool_call_id is not None:
            raise wrong_field("tool_call_id", "role", f"a message of the role {self.role} has none; leave it out")
        return self

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


class History:
    """A chat as templates take it, which know a developer as the system, and arguments of calls as objects.

    Attributes:
        messages: What was said so far.
    """

    def __init__(self) -> None:
        """Begin a chat."""
        self.messages: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}  # of the tools, by the ids of calls

    def say(self, role: str, text: str, name: str | None = None) -> None:
        """Add a message."""
        message = {"role": "system" if role == "developer" else role, "content": text}
        self.messages.append(message if name is None else {**message, "name": name})

    def call(self, key: str, name: str, arguments: str, field: str) -> None:
        """Add a call to the assistant's message, which is new unless it is the last one."""
        try:
            given = json.loads(arguments or "{}", parse_constant=_refused)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise FormError(field, "it is not a JSON object; send a whole call as the answer had it")
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.say("assistant", "")
        function = {"name": name, "arguments": given}
        self.messages[-1].setdefault("tool_calls", []).append({"id": key, "type": "function", "function": function})
        self._names[key] = name

    def result(self, key: str, text: str, field: str) -> None:
        """Add the result of a call."""
        if key not in self._names:
            raise FormError(field, "no call before it has this id; give the id of one")
        self.messages.append({"role": "tool", "content": text, "tool_call_id": key, "name": self._names[key]})


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates of chats take them."""
    history = History()
    for number, message in enumerate(messages):
        field = f"messages.{number}"
        if message.tool_call_id is not None:
            history.result(message.tool_call_id, message.text, f"{field}.tool_call_id")
            continue
        history.say(message.role, message.text, message.name)
        for index, call in enumerate(message.tool_calls or ()):
            name, arguments = call.function.name, call.function.arguments
            history.call(call.id, name, arguments, f"{field}.tool_calls.{index}.function.arguments")
    return history.messages
