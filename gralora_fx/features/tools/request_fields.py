"""Request fields for tools, including calls in messages, and their effect on prompts and answers."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from gralora_fx.features.tools.call_formats import CallReader
from gralora_fx.features.tools.tool_fields import (
    MOST,
    AllowedFunctions,
    AllowedToolsChoice,
    ChatTool,
    FunctionFields,
    Mode,
    NamedFunction,
    NamedTool,
    ResponseTool,
    ToolChoice,
    ToolUse,
    call_grammar,
    chosen_tools,
    template_tool,
)
from gralora_fx.features.tools.tool_template import ToolTemplate, attempts
from gralora_fx.run.generate.constraints import Constraints
from gralora_fx.run.generate.request_errors import WrongFieldError
from gralora_fx.service.protocols.openai.answer_plan import AnswerPlan, PlannedRequest
from gralora_fx.service.protocols.openai.messages import History, InputText, ItemFields, MessageFields, joined
from gralora_fx.service.protocols.openai.strict_model import Idle, ListOf, StrictModel, wrong_field

if TYPE_CHECKING:
    from gralora_fx.service.engines import TextEngine


class CalledFunction(StrictModel):
    """The function of an earlier call."""

    name: str
    arguments: str


class ToolCall(StrictModel):
    """A call in the chat's history."""

    without_effect: ClassVar[Idle] = {"index": None}

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CalledMessageFields(MessageFields):
    """A chat message: text, an assistant's calls, or the result of one."""

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
    """An item of a response's input: a message, a tool call, or the result of one."""

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
    """Append a call to the last message if it is the assistant's, else to a new one."""
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


_OF_OLD: Idle = {"functions": ([],), "function_call": ("none", "auto")}


class ToolCaller(PlannedRequest):
    """A request, chat or response, whose answer may call tools."""

    tool_choice: Mode | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @abstractmethod
    def functions(self) -> dict[str, FunctionFields]:
        """Return the tools by the names of their fields."""

    @property
    def is_parallel(self) -> bool:
        """Return whether an answer may have several calls."""
        return self.parallel_tool_calls is not False

    def tool_use(self, constraints: Constraints | None) -> ToolUse | None:
        """Return the tools that the answer may call, checked; None if it calls none."""
        choice = self.tool_choice
        mode, named = choice.named() if isinstance(choice, ToolChoice) else (choice or "auto", dict[str, str]())
        named = {f"tool_choice.{field}": name for field, name in named.items()}
        is_parallel = self.is_parallel and mode != "named"
        return chosen_tools(self.functions(), mode, named, constraints, is_parallel=is_parallel)

    def plan(self, engine: TextEngine) -> AnswerPlan:
        """Plan the answers; this compiles constraints, which takes a while."""
        if (constraints := engine.constraints) is None and self.functions():
            raise WrongFieldError("tools", "no installed feature can constrain tool calls; leave it out")
        if (use := self.tool_use(constraints)) is None:
            return super().plan(engine)
        assert constraints is not None
        template = engine.templates[ToolTemplate]
        constraint = call_grammar(constraints, template.format, use, constraints.part(self.wanted()))
        return AnswerPlan(constraint, template.shown, partial(CallReader, template.format))

    def chats(
        self, chat: Sequence[Mapping[str, Any]], engine: TextEngine
    ) -> Iterable[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]]:
        """Return forms of a chat to try in order; earlier messages may have calls even if the answer may not."""
        template: ToolTemplate = engine.templates[ToolTemplate]
        functions = () if self.tool_choice == "none" else self.functions().values()
        tools = [template_tool(function) for function in functions]
        return attempts(template.messages(chat, tools), tools if template.has_tools else ())


class ChatToolFields(ToolCaller):
    """Tool fields of a chat request."""

    without_effect: ClassVar[Idle] = _OF_OLD

    tools: Annotated[list[ChatTool] | None, Field(max_length=MOST, fail_fast=True)] = None
    tool_choice: Mode | NamedTool | AllowedToolsChoice | None = None

    def functions(self) -> dict[str, FunctionFields]:
        """Return the tools by the names of their fields."""
        return {f"tools.{index}.function": tool.function for index, tool in enumerate(self.tools or ())}


class ResponseToolFields(ToolCaller):
    """Tool fields of a response request."""

    without_effect: ClassVar[Idle] = {"max_tool_calls": None}

    tools: Annotated[list[ResponseTool] | None, Field(max_length=MOST, fail_fast=True)] = None
    tool_choice: Mode | NamedFunction | AllowedFunctions | None = None

    def functions(self) -> dict[str, FunctionFields]:
        """Return the tools by the names of their fields."""
        return {f"tools.{index}": tool for index, tool in enumerate(self.tools or ())}

    def echoed(self) -> Iterator[tuple[str, Any]]:
        """Return the request's fields that its response repeats."""
        yield from super().echoed()
        unsaid = {"description": None, "parameters": None, "strict": True}
        yield "tools", [{**unsaid, **_plain(tool)} for tool in self.tools or ()]
        choice = self.tool_choice
        yield "tool_choice", _plain(choice) if isinstance(choice, StrictModel) else choice or "auto"
        yield "parallel_tool_calls", self.is_parallel


class CompletionToolFields(PlannedRequest):
    """Fields of a completion that request the default: no calls."""

    without_effect: ClassVar[Idle] = {
        **_OF_OLD,
        "parallel_tool_calls": None,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
    }


def _plain(model: StrictModel) -> dict[str, Any]:
    return model.model_dump(by_alias=True, exclude_none=True)


FIELDS = {
    "CompletionRequest": CompletionToolFields,
    "ChatRequest": ChatToolFields,
    "ResponseRequest": ResponseToolFields,
    "ChatMessage": CalledMessageFields,
    "InputItem": CallItemFields,
}
