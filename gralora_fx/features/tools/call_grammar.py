"""Constraints on answers that may call tools: text until a call begins, then a call that meets a tool's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gralora_fx.features.tools.call_formats import CallFormat
from gralora_fx.run.generate.constraints import Constraint, Constraints, Form
from gralora_fx.run.generate.request_errors import WrongFieldError

_LARGEST = 256 * 1024  # bytes of the schemas of all tools
_OPEN = ("allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties")
_CONTENT, _TEXT = "content", "/(?s:.*)/"


@dataclass(frozen=True)
class Tool:
    """A function that an answer may call.

    Attributes:
        name: Its name.
        form: The form of its arguments alone, a JSON schema.
    """

    name: str
    form: Form

    @classmethod
    def of(cls, name: str, parameters: Mapping[str, Any] | None, field: str, constraints: Constraints) -> Tool:
        """A tool, whose arguments are checked as far as that needs no tokenizer."""
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
    """The tools that an answer may call.

    Attributes:
        tools: The tools, one or several.
        is_required: Whether it calls one at least, and has no text.
        is_parallel: Whether it may call several, or one several times.
    """

    tools: tuple[Tool, ...]
    is_required: bool
    is_parallel: bool


def call_grammar(constraints: Constraints, form: CallFormat, use: ToolUse, content: Form | None = None) -> Constraint:
    """Constrain answers that may call tools, and those that call none to a form if one is given."""
    if content is not None and not use.is_required and form.begins_answer:
        raise WrongFieldError(
            content.field,
            "it and tools do not go together with this model, whose calls are JSON as the answer would be; give "
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
    """The rules of an answer around the schemas of its tools, in llguidance's variant of Lark."""

    def __init__(self, constraints: Constraints, form: CallFormat, use: ToolUse) -> None:
        self._form, self._use = form, use
        special = constraints.special_tokens(use.tools[0].form.field)
        own = form.special_tokens(constraints.tokenizer)
        self._tokens = {token: index for token, index in own.items() if index in special}
        self._other = special - set(self._tokens.values())

    def text(self, *, has_form: bool) -> str:
        """The rules."""
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
        """Rules of calls."""
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
        """Rules of an answer that is free text, or calls from its first letter."""
        form, other = self._form, self._others()
        first = f"BEGIN | BEGIN {other} (TEXT {other})* TEXT" if other else "BEGIN"
        tagged = f"{self._literal(form.tag)} calls | " if form.tag in self._tokens else ""
        return {"start": f"{tagged}calls | {first}", "BEGIN": f"/{_not_beginning(form.trigger)}/", "TEXT": _TEXT}

    def _within_text(self) -> dict[str, str]:
        """Rules of an answer that is free text until a call begins, if one does."""
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
        """The tokens that may come within free text though no letters stand for them; empty if there are none."""
        return f"<[{','.join(_ranges(sorted(self._other)))}]>" if self._other else ""

    def _literal(self, text: str) -> str:
        """A text as a rule has it, its special tokens by their ids."""
        if not self._tokens:
            return json.dumps(text) if text else ""
        parts = re.split("({})".format("|".join(map(re.escape, self._tokens))), text)
        return " ".join(f"<[{self._tokens[p]}]>" if p in self._tokens else json.dumps(p) for p in parts if p)


def _any_of(name: str, count: int) -> str:
    return f"({' | '.join(f'{name}_{number}' for number in range(count))})"


def _ranges(ids: list[int]) -> list[str]:
    """Ids as ranges, which are shorter."""
    ranges: list[list[int]] = []
    for index in ids:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return [f"{first}-{last}" for first, last in ranges]


def _not_beginning(start: str) -> str:
    """An expression for all texts that do not begin with another one."""
    others, ahead = [], ""
    for letter in start:
        others.append(f"{ahead}[^{re.escape(letter)}](?s:.*)")
        ahead += re.escape(letter)
    beginnings = "".join(f"({re.escape(letter)}" for letter in start[:-1]) + ")?" * (len(start) - 1)
    return "|".join([*others, beginnings])
