"""Tools in requests, and the grammar of answers that call them."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from gralora_fx.errors import shown
from gralora_fx.features.tools.call_formats import CallFormat
from gralora_fx.run.generate.constraints import Constraint, Constraints, Form
from gralora_fx.run.generate.request_errors import WrongFieldError
from gralora_fx.service.protocols.openai.strict_model import StrictModel

_LARGEST = 256 * 1024  # bytes of the schemas of all tools
_OPEN = ("allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties")
_CONTENT, _TEXT = "content", "/(?s:.*)/"


@dataclass(frozen=True)
class Tool:
    """A function that an answer may call."""

    name: str
    form: Form  # the JSON schema of its arguments

    @classmethod
    def of(cls, name: str, parameters: Mapping[str, Any] | None, field: str, constraints: Constraints) -> Tool:
        """Return a tool, its schema checked as far as possible without a tokenizer."""
        schema: dict[str, Any] = {"type": "object", **(parameters or {})}
        if schema["type"] != "object":
            raise WrongFieldError(
                field, "the arguments of a function are an object; give a schema with the type 'object'"
            )
        if schema.keys().isdisjoint(_OPEN):
            schema["additionalProperties"] = False
        form = constraints.part({field: ("json", schema)})
        assert form is not None
        return cls(name, form)


@dataclass(frozen=True)
class ToolUse:
    """The tools that an answer may call."""

    tools: tuple[Tool, ...]  # one or several tools
    is_required: bool  # whether the answer is calls only, at least one
    is_parallel: bool  # whether it may have several calls


def call_grammar(constraints: Constraints, form: CallFormat, use: ToolUse, content: Form | None = None) -> Constraint:
    """Constrain answers that may call tools; text without calls follows the given form, if any."""
    if content is not None and not use.is_required and form.begins_answer:
        raise WrongFieldError(
            content.field,
            "it cannot be combined with tools for this model, whose tool calls look like a JSON answer; give "
            "tool_choice 'none' or 'required', or leave one of them out",
        )
    if sum(tool.form.size for tool in use.tools) > _LARGEST:
        raise WrongFieldError(
            "tools", f"their schemas are larger than {_LARGEST // 1024} KiB; give fewer or simpler ones"
        )
    rules = _Lark(constraints, form, use).text(has_form=content is not None)
    named = {f"arguments_{number}": tool.form for number, tool in enumerate(use.tools)}
    if content is not None and not use.is_required:
        named[_CONTENT] = content
    return constraints.joined(rules, named, "tools")


class _Lark:
    """The rules around the tools' schemas, in llguidance's variant of Lark."""

    def __init__(self, constraints: Constraints, form: CallFormat, use: ToolUse) -> None:
        self._form, self._use = form, use
        special = constraints.special_tokens(use.tools[0].form.field)
        assert constraints.tokenizer is not None
        own = form.special_tokens(constraints.tokenizer)
        self._tokens = {token: index for token, index in own.items() if index in special}
        self._other = special - set(self._tokens.values())

    def text(self, *, has_form: bool) -> str:
        """Return the rules."""
        start = self._form.start
        if self._use.is_required:
            rules = {"start": "calls"}
        elif has_form:
            rules = {"start": f"calls | @{_CONTENT}"}
        elif self._form.begins_answer:
            rules = self._instead_of_text()
        else:
            rules = self._within_text()
            start = start.removeprefix(self._form.trigger)
        return "\n".join(f"{name}: {body}" for name, body in (rules | self._calls(start)).items())

    def _calls(self, start: str) -> dict[str, str]:
        """Return the rules of calls."""
        form, count = self._form, len(self._use.tools)
        several = form.between is not None and self._use.is_parallel
        rules = {"calls": f"{_any_of('first', count)} {'more*' if several else ''} {self._literal(form.end)}"}
        befores = {"first": start, **({"next": form.between or ""} if several else {})}
        if several:
            rules["more"] = _any_of("next", count)
        for number, tool in enumerate(self._use.tools):
            for name, before in befores.items():
                # one literal, as a lexer looks no further than the end of its longest match
                head = self._literal(f"{before}{form.head}{tool.name}{form.middle}")
                rules[f"{name}_{number}"] = f"{head} @arguments_{number} {self._literal(form.tail)}"
        return rules

    def _instead_of_text(self) -> dict[str, str]:
        """Return the rules of an answer that is either free text or calls from its first letter."""
        form, other = self._form, self._others()
        first = f"BEGIN | BEGIN {other} (TEXT {other})* TEXT" if other else "BEGIN"
        tagged = f"{self._literal(form.tag)} calls | " if form.tag in self._tokens else ""
        return {"start": f"{tagged}calls | {first}", "BEGIN": f"/{_not_beginning(form.trigger)}/", "TEXT": _TEXT}

    def _within_text(self) -> dict[str, str]:
        """Return the rules of an answer of free text, up to an optional call."""
        form, other = self._form, self._others()
        before = f"(TEXT {other})*" if other else ""
        trigger = f"written | TEXT {self._literal(form.trigger)}" if form.trigger in self._tokens else "written"
        return {
            "start": f"{before} TEXT | {before} trigger calls",
            "trigger": trigger,
            "written[lazy]": f"TEXT {json.dumps(form.trigger)}",
            "TEXT": _TEXT,
        }

    def _others(self) -> str:
        """Return a class of the special tokens allowed within free text; empty if there are none."""
        return f"<[{','.join(_ranges(sorted(self._other)))}]>" if self._other else ""

    def _literal(self, text: str) -> str:
        """Return a text as a rule's literals, special tokens by id."""
        if not self._tokens:
            return json.dumps(text) if text else ""
        parts = re.split("({})".format("|".join(map(re.escape, self._tokens))), text)
        return " ".join(f"<[{self._tokens[p]}]>" if p in self._tokens else json.dumps(p) for p in parts if p)


def _any_of(name: str, count: int) -> str:
    return f"({' | '.join(f'{name}_{number}' for number in range(count))})"


def _ranges(ids: list[int]) -> list[str]:
    """Return ids as ranges."""
    ranges: list[list[int]] = []
    for index in ids:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return [f"{first}-{last}" for first, last in ranges]


def _not_beginning(start: str) -> str:
    """Return a regular expression for all texts that do not begin with `start`."""
    others, ahead = [], ""
    for letter in start:
        others.append(f"{ahead}[^{re.escape(letter)}](?s:.*)")
        ahead += re.escape(letter)
    beginnings = "".join(f"({re.escape(letter)}" for letter in start[:-1]) + ")?" * (len(start) - 1)
    return "|".join([*others, beginnings])


MOST = 128  # OpenAI's limit
_DESCRIBED = ("name", "description", "parameters")  # fields of a function that the model sees
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
    """A choice of the tools that an answer may call."""

    @abstractmethod
    def named(self) -> tuple[Literal["auto", "required", "named"], dict[str, str]]:
        """Return whether a call is required, and the chosen tools' names by field."""


class NamedTool(ToolChoice):
    """A choice of one tool."""

    type: Literal["function"]
    function: FunctionName

    def named(self) -> tuple[Literal["named"], dict[str, str]]:
        """Return the chosen tool, which must be called."""
        return "named", {"function.name": self.function.name}


class AllowedTools(StrictModel):
    """Some of the tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST, fail_fast=True)]


class AllowedToolsChoice(ToolChoice):
    """A choice of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    def named(self) -> tuple[Literal["auto", "required"], dict[str, str]]:
        """Return the mode, and the allowed tools' names by field."""
        allowed = self.allowed_tools
        tools = {f"allowed_tools.tools.{n}.function.name": tool.function.name for n, tool in enumerate(allowed.tools)}
        return allowed.mode, tools


class _Function(StrictModel):
    """The only kind of tool; a base class, so that validation reports another kind first."""

    type: Literal["function"]


class ResponseTool(FunctionFields, _Function):
    """A function as a tool of a response."""


class NamedFunction(ToolChoice):
    """A choice of one tool of a response."""

    type: Literal["function"]
    name: str

    def named(self) -> tuple[Literal["named"], dict[str, str]]:
        """Return the chosen tool, which must be called."""
        return "named", {"name": self.name}


class AllowedFunctions(ToolChoice):
    """Some of a response's tools, and whether one must be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MOST, fail_fast=True)]

    def named(self) -> tuple[Literal["auto", "required"], dict[str, str]]:
        """Return the mode, and the allowed tools' names by field."""
        return self.mode, {f"tools.{index}.name": tool.name for index, tool in enumerate(self.tools)}


def template_tool(function: FunctionFields) -> dict[str, Any]:
    """Return a function as chat templates take it: only the given fields, since templates write all of them."""
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
    """Return the tools that an answer may call; None if it calls none."""
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
