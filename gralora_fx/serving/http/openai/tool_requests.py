"""The tools of a request, and which of them its answer may or must call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from gralora_fx.errors import shown
from gralora_fx.serving.answer_form import FormError
from gralora_fx.serving.call_grammar import Tool, ToolUse
from gralora_fx.serving.http.openai.strict_model import StrictModel

_MOST = 128  # OpenAI's
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


class NamedTool(StrictModel):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(StrictModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=_MOST, fail_fast=True)]


class AllowedToolsChoice(StrictModel):
    """A choice of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ToolCaller(StrictModel):
    """What chats and responses share: tools that an answer may call, and no answer begins with its prompt."""

    parallel_tool_calls: bool | None = None

    @abstractmethod
    def functions(self) -> dict[str, FunctionFields]:
        """The tools by the names of their fields."""

    @property
    @abstractmethod
    def calls_none(self) -> bool:
        """Whether the request says that the answer may call no tool."""

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
        return [] if self.calls_none else [template_tool(function) for function in self.functions().values()]


class ToolFields(ToolCaller):
    """The fields of a chat that are about tools."""

    tools: Annotated[list[ChatTool] | None, Field(max_length=_MOST, fail_fast=True)] = None
    tool_choice: Mode | NamedTool | AllowedToolsChoice | None = None

    def functions(self) -> dict[str, FunctionFields]:
        """The tools by the names of their fields."""
        return {f"tools.{index}.function": tool.function for index, tool in enumerate(self.tools or ())}

    @property
    def calls_none(self) -> bool:
        """Whether the request says that the answer may call no tool."""
        return self.tool_choice == "none"

    def tool_use(self) -> ToolUse | None:
        """The tools that the answer may call; None if it calls none.

        Raises:
            FormError: A tool's arguments are no schema, two have one name, or a choice names none of them.
        """
        functions, choice = self.functions(), self.tool_choice
        if isinstance(choice, NamedTool):
            named = {"tool_choice.function.name": choice.function.name}
            return chosen_tools(functions, "named", named, is_parallel=False)
        if isinstance(choice, AllowedToolsChoice):
            fields = "tool_choice.allowed_tools.tools"
            named = {
                f"{fields}.{index}.function.name": tool.function.name
                for index, tool in enumerate(choice.allowed_tools.tools)
            }
            return chosen_tools(functions, choice.allowed_tools.mode, named, is_parallel=self.is_parallel)
        return chosen_tools(functions, choice or "auto", {}, is_parallel=self.is_parallel)


def template_tool(function: FunctionFields) -> dict[str, Any]:
    """A function as templates of chats take it."""
    fields = {
        "name": function.name,
        "description": function.description or "",
        "parameters": function.parameters or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": fields}


def chosen_tools(
    functions: dict[str, FunctionFields],
    mode: Literal["none", "auto", "required", "named"],
    named: dict[str, str],
    *,
    is_parallel: bool,
) -> ToolUse | None:
    """The tools that an answer may call; None if it calls none.

    Args:
        functions: All tools, by the fields of the request that have them.
        mode: Whether one may or must be called.
        named: Names of those that may be, by the fields that name them; empty for all.
        is_parallel: Whether an answer may have several calls.

    Raises:
        FormError: A tool's arguments are no schema, two have one name, or one that is named is not there.
    """
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
