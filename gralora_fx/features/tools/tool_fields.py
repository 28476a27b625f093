"""Tools and choices of tools in requests: which tools there are, and which an answer may or must call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from gralora_fx.errors import shown
from gralora_fx.features.tools.call_grammar import Tool, ToolUse
from gralora_fx.run.generate.constraints import Constraints
from gralora_fx.run.generate.request_errors import WrongFieldError
from gralora_fx.service.protocols.openai.strict_model import StrictModel

MOST = 128  # OpenAI's
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
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST, fail_fast=True)]


class AllowedToolsChoice(ToolChoice):
    """A choice of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    def named(self) -> tuple[Literal["auto", "required"], dict[str, str]]:
        """The tools, and what their mode says."""
        allowed = self.allowed_tools
        tools = {f"allowed_tools.tools.{n}.function.name": tool.function.name for n, tool in enumerate(allowed.tools)}
        return allowed.mode, tools


class _Function(StrictModel):
    """The kind of tools that there are; a field of its own, so that it is what is said of another kind."""

    type: Literal["function"]


class ResponseTool(FunctionFields, _Function):
    """A function as a tool of a response."""


class NamedFunction(ToolChoice):
    """A tool of a response by its name."""

    type: Literal["function"]
    name: str

    def named(self) -> tuple[Literal["named"], dict[str, str]]:
        """The one tool, which is called."""
        return "named", {"name": self.name}


class AllowedFunctions(ToolChoice):
    """Some of a response's tools, and whether one of them must be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MOST, fail_fast=True)]

    def named(self) -> tuple[Literal["auto", "required"], dict[str, str]]:
        """The tools, and what their mode says."""
        return self.mode, {f"tools.{index}.name": tool.name for index, tool in enumerate(self.tools)}


def template_tool(function: FunctionFields) -> dict[str, Any]:
    """A function as templates of chats take it: what is given of it, since they write all of that."""
    fields = {name: getattr(function, name) for name in function.given if name in _DESCRIBED}
    return {"type": "function", "function": fields}


def chosen_tools(
    functions: dict[str, FunctionFields],
    mode: Literal["none", "auto", "required", "named"],
    named: dict[str, str],
    constraints: Constraints | None,
    *,
    is_parallel: bool,
) -> ToolUse | None:
    """The tools that an answer may call; None if it calls none."""
    tools: dict[str, Tool] = {}
    for field, function in functions.items():
        if function.name in tools:
            raise WrongFieldError(f"{field}.name", f"another tool is called {shown(function.name)} too; rename one")
        assert constraints is not None
        tools[function.name] = Tool.of(function.name, function.parameters, f"{field}.parameters", constraints)
    for field, name in named.items():
        if name not in tools:
            raise WrongFieldError(field, f"no tool is called {shown(name)}; name one of the tools")
    if mode != "auto" and mode != "none" and not tools:
        raise WrongFieldError("tool_choice", "there are no tools to choose from; give tools, or leave it out")
    if mode == "none" or not tools:
        return None
    kept: Sequence[Tool] = [tools[name] for name in dict.fromkeys(named.values())] or list(tools.values())
    return ToolUse(tuple(kept), mode != "auto", is_parallel)
