"""The tools of a request, and which of them its answer may or must call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from gralora_fx.errors import shown
from gralora_fx.run.generate.answer_form import FormError
from gralora_fx.run.generate.call_grammar import Tool, ToolUse
from gralora_fx.service.protocols.openai.strict_model import StrictModel

_MOST = 128  # OpenAI's
_DESCRIBED = ("name", "description", "parameters")  # what a model is told of a function
Name: TypeAlias = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
Mode: TypeAlias = Literal["none", "auto", "required"]


class FunctionFields(StrictModel):
    """A function. Its schema is followed whether it is `strict` or not."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(StrictModel):
    """A tool of a chat."""

    type: Literal["function"]
    function: FunctionFields


class FunctionName(StrictModel):
    """The name of a function."""

    name: str


class ToolChoice(StrictModel):
    """Which tools an answer may call."""

    @abstractmethod
    def named(self) -> tuple[Literal["auto", "required", "named"], dict[str, str]]:
        """Whether it must call one, and the names of the tools by the fields that name them."""


class NamedTool(ToolChoice):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName

    def named(self) -> tuple[Literal["named"], dict[str, str]]:
        """The one tool, which is called."""
        return "named", {"function.name": self.function.name}


class AllowedTools(StrictModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=_MOST, fail_fast=True)]


class AllowedToolsChoice(ToolChoice):
    """A choice of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    def named(self) -> tuple[Literal["auto", "required"], dict[str, str]]:
        """The tools, and what their mode says."""
        allowed = self.allowed_tools
        tools = {f"allowed_tools.tools.{n}.function.name": tool.function.name for n, tool in enumerate(allowed.tools)}
        return allowed.mode, tools


class ToolCaller(StrictModel):
    """What chats and responses share: tools that an answer may call, and no answer begins with its prompt."""

    tool_choice: Mode | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @abstractmethod
    def functions(self) -> dict[str, FunctionFields]:
        """The tools by the names of their fields."""

    @property
    def echo(self) -> bool:
        """Whether the answer begins with the prompt: never."""
        return False

    @property
    def has_tools(self) -> bool:
        """Whether it has tools, whose schemas are to be checked."""
        return bool(self.functions())

    @property
    def is_parallel(self) -> bool:
        """Whether an answer may have several calls."""
        return self.parallel_tool_calls is not False

    def template_tools(self) -> list[dict[str, Any]]:
        """The tools as templates of chats take them; none if the answer may call none."""
        return [] if self.tool_choice == "none" else [template_tool(function) for function in self.functions().values()]

    def tool_use(self) -> ToolUse | None:
        """The tools that the answer may call; None if it calls none.

        Raises:
            FormError: A tool's arguments are no schema, two have one name, or a choice names none of them.
        """
        choice = self.tool_choice
        mode, named = choice.named() if isinstance(choice, ToolChoice) else (choice or "auto", dict[str, str]())
        named = {f"tool_choice.{field}": name for field, name in named.items()}
        return chosen_tools(self.functions(), mode, named, is_parallel=self.is_parallel and mode != "named")


class ToolFields(ToolCaller):
    """The fields of a chat that are about tools."""

    tools: Annotated[list[ChatTool] | None, Field(max_length=_MOST, fail_fast=True)] = None
    tool_choice: Mode | NamedTool | AllowedToolsChoice | None = None

    def functions(self) -> dict[str, FunctionFields]:
        """The tools by the names of their fields."""
        return {f"tools.{index}.function": tool.function for index, tool in enumerate(self.tools or ())}


def template_tool(function: FunctionFields) -> dict[str, Any]:
    """A function as templates of chats take it: what is given of it, since they write all of that."""
    fields = {name: getattr(function, name) for name in function.given if name in _DESCRIBED}
    return {"type": "function", "function": fields}


def chosen_tools(
    functions: dict[str, FunctionFields],
    mode: Literal["none", "auto", "required", "named"],
    named: dict[str, str],
    *,
    is_parallel: bool,
) -> ToolUse | None:
    """The tools that an answer may call; None if it calls none."""
    tools: dict[str, Tool] = {}
    for field, function in functions.items():
        if function.name in tools:
            raise FormError(f"{field}.name", f"another tool is called {shown(function.name)} too; rename one")
        tools[function.name] = Tool.of(function.name, function.parameters, f"{field}.parameters")
    for field, name in named.items():
        if name not in tools:
            raise FormError(field, f"no tool is called {shown(name)}; name one of the tools")
    if mode != "auto" and mode != "none" and not tools:
        raise FormError("tool_choice", "there are no tools to choose from; give tools, or leave it out")
    if mode == "none" or not tools:
        return None
    kept: Sequence[Tool] = [tools[name] for name in dict.fromkeys(named.values())] or list(tools.values())
    return ToolUse(tuple(kept), mode != "auto", is_parallel)
