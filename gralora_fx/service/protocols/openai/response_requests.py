"""Requests of `/v1/responses` as JSON: text and calls of tools in and out, without anything that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from gralora_fx.errors import ServingError
from gralora_fx.run.generate.answer_form import GivenForms
from gralora_fx.service.protocols.openai.idle_fields import (
    INPUT_ITEM,
    INPUT_TEXT,
    REASONING,
    RESPONSE,
    TEXT_OPTIONS,
    Idle,
    IdleInclude,
)
from gralora_fx.service.protocols.openai.messages import History
from gralora_fx.service.protocols.openai.requests import SamplingFields, StreamOptions, Whole
from gralora_fx.service.protocols.openai.strict_model import ListOf, StrictModel, wrong_field
from gralora_fx.service.protocols.openai.tool_requests import FunctionFields, Mode, ToolCaller, ToolChoice

_LOGPROBS = "message.output_text.logprobs"
_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


class InputText(StrictModel):
    """A part of a message."""

    without_effect: ClassVar[Idle] = INPUT_TEXT

    type: Literal["input_text", "output_text"]
    text: str


class InputItem(StrictModel):
    """A message, a call of a tool, or the result of one."""

    without_effect: ClassVar[Idle] = INPUT_ITEM

    type: Literal["message", "function_call", "function_call_output", "item_reference"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | ListOf[InputText] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | ListOf[InputText] | None = None

    @model_validator(mode="after")
    def _fits(self) -> InputItem:
        if self.type == "item_reference":
            problem = (
                "it names an item of an earlier response, and none is kept; send the item itself, with store false"
            )
            raise wrong_field("type", "reference", problem)
        needed = _NEEDED[self.type]
        for name in ("role", "content", "call_id", "name", "arguments", "output"):
            if name in needed and getattr(self, name) is None:
                raise wrong_field(name, "missing", "it is missing")
            if name not in needed and getattr(self, name) is not None:
                raise wrong_field(name, "type", f"an item of the type {self.type} has none; leave it out")
        return self

    def add_to(self, history: History, field: str) -> None:
        """Add it to a chat."""
        if self.type == "message":
            history.say(str(self.role), _joined(self.content))
        elif self.type == "function_call":
            history.call(str(self.call_id), str(self.name), str(self.arguments), f"{field}.arguments")
        else:
            history.result(str(self.call_id), _joined(self.output), f"{field}.call_id")


class _Function(StrictModel):
    """The kind of tools that there are; a field of its own, so that it is what is said of another kind."""

    type: Literal["function"]


class ResponseTool(FunctionFields, _Function):
    """A function as a tool."""


class NamedFunction(ToolChoice):
    """A tool by its name."""

    type: Literal["function"]
    name: str

    def named(self) -> tuple[Literal["named"], dict[str, str]]:
        """The one tool, which is called."""
        return "named", {"name": self.name}


class AllowedFunctions(ToolChoice):
    """Some of the tools, and whether one of them must be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=128, fail_fast=True)]

    def named(self) -> tuple[Literal["auto", "required"], dict[str, str]]:
        """The tools, and what their mode says."""
        return self.mode, {f"tools.{index}.name": tool.name for index, tool in enumerate(self.tools)}


class TextFormat(StrictModel):
    """The form of the text. A schema is followed whether it is `strict` or not."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> TextFormat:
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if self.type == "json_schema" and value is None:
                raise wrong_field(name, "missing", "it is missing")
            if self.type != "json_schema" and value is not None:
                raise wrong_field(name, "type", f"it has no effect with type {self.type}; leave it out")
        return self


class TextConfig(StrictModel):
    """How the text is to be."""

    without_effect: ClassVar[Idle] = TEXT_OPTIONS

    format: TextFormat | None = None


class Reasoning(StrictModel):
    """Options of reasoning."""

    without_effect: ClassVar[Idle] = REASONING


class ResponseRequest(SamplingFields, ToolCaller):
    """A request of `/v1/responses`, which is kept no longer than until it is answered, whatever `store` says."""

    without_effect: ClassVar[Idle] = RESPONSE
    prompt_field: ClassVar[str] = "input"

    input: str | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Whole | None = None
    tools: Annotated[list[ResponseTool] | None, Field(max_length=128, fail_fast=True)] = None
    tool_choice: Mode | NamedFunction | AllowedFunctions | None = None
    text: TextConfig | None = None
    include: ListOf[Literal["message.output_text.logprobs"] | IdleInclude] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning: Reasoning | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def prompts(self) -> list[list[dict[str, Any]]]:
        """The chat, as tokenizers take it."""
        history = History()
        if self.instructions is not None:
            history.say("system", self.instructions)
        if isinstance(self.input, str):
            history.say("user", self.input)
        else:
            for index, item in enumerate(self.input):
                item.add_to(history, f"input.{index}")
        return [history.messages]

    @property
    def n(self) -> int:
        """How many answers: one."""
        return 1

    @property
    def top_scores(self) -> int | None:
        """Of each token, how many of the likeliest tokens are scored beside it; None to score no token."""
        if _LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        if self.top_logprobs:
            problem = f"top_logprobs has no effect unless include has {_LOGPROBS!r}; give it too"
            raise ServingError(problem).about("top_logprobs")
        return None

    def ignored(self) -> Iterator[str]:
        """The fields that are accepted and have no effect."""
        yield from super().ignored()
        if {*(self.include or ())} - {_LOGPROBS}:
            yield "include"

    def functions(self) -> dict[str, FunctionFields]:
        """The tools by the names of their fields."""
        return {f"tools.{index}": tool for index, tool in enumerate(self.tools or ())}

    def most_tokens(self, left: int) -> int:
        """The most tokens to add to a prompt after which there is room for some."""
        return max(left, 1) if self.max_output_tokens is None else self.max_output_tokens

    def forms(self) -> GivenForms:
        """The form that the text may have, by its field."""
        given = None if self.text is None else self.text.format
        if given is None or given.type == "text":
            return {}
        if given.schema_ is None:
            return {"text.format": ("json", {"type": "object"})}
        return {"text.format.schema": ("json", given.schema_)}

    def echoed(self) -> Iterator[tuple[str, Any]]:
        """The fields of the request that its response has again."""
        text = self.text.format if self.text is not None and self.text.format is not None else TextFormat(type="text")
        yield "instructions", self.instructions
        yield "max_output_tokens", self.max_output_tokens
        yield "temperature", 1.0 if self.temperature is None else self.temperature
        yield "top_p", 1.0 if self.top_p is None else self.top_p
        yield "presence_penalty", self.presence_penalty
        yield "frequency_penalty", self.frequency_penalty
        yield "top_logprobs", self.top_logprobs or 0
        yield "text", {"format": _plain(text)}
        unsaid = {"description": None, "parameters": None, "strict": True}
        yield "tools", [{**unsaid, **_plain(tool)} for tool in self.tools or ()]
        choice = self.tool_choice
        yield "tool_choice", _plain(choice) if isinstance(choice, StrictModel) else choice or "auto"
        yield "parallel_tool_calls", self.is_parallel
        yield "metadata", self.metadata or {}
        yield "prompt_cache_key", self.prompt_cache_key
        yield "safety_identifier", self.safety_identifier


def _joined(content: str | list[InputText] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def _plain(model: StrictModel) -> dict[str, Any]:
    return model.model_dump(by_alias=True, exclude_none=True)
