"""An option, declared once as the field of a frozen record: its type, its default, its text and its check.

precision: Annotated[Literal["fp32", "fp16"], Option("Precision of weights and cache.")] = "fp32"

The rest is derived from the declaration: the check of a value (`check_options`), the parameter of a command
(`cli.values`) and the row of a table in the documentation.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from gralora_fx.errors import GraloraError, option, shown

# headings of the command line's help
MODEL, ADAPTERS, NUMBERS, WRITTEN, COMPARISON = (
    "Model",
    "Adapters",
    "Numbers",
    "What is written",
    "Comparison with PyTorch",
)


@dataclass(frozen=True)
class Option:
    """The declaration of an option, beside its type and its default."""

    help: str = ""  # its text for the command line and the documentation; empty for a Python-only option
    group: str = ""  # its heading in a command's help; empty for the common one
    metavar: str = ""  # the placeholder of its value; empty to list its type's choices
    left_out: str = ""  # the effect of omitting it, in words, if its default does not show it
    least: int | None = None  # the least value of a number; None for no check
    environment: str = ""  # an environment variable that sets it on the command line; empty for none
    # a check beyond the type: returns what is wrong with a value, or None
    problem: Callable[[Any], str | None] = lambda value: None


@dataclass(frozen=True)
class DeclaredOption:
    """An option with its field in a record."""

    name: str  # name of the field and of the Python argument
    type: Any
    default: Any
    option: Option  # the rest of the declaration

    @property
    def types(self) -> tuple[Any, ...]:
        """The types of a union, or the only one."""
        is_union = typing.get_origin(self.type) in (Union, types.UnionType)
        return typing.get_args(self.type) if is_union else (self.type,)

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts that it takes, if it takes no others."""
        return tuple(text for one in self.types if typing.get_origin(one) is Literal for text in typing.get_args(one))

    @property
    def is_flag(self) -> bool:
        """True if it is a boolean."""
        return self.types == (bool,)

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def metavar(self) -> str:
        """The placeholder of its value on the command line."""
        return self.option.metavar or f"[{'|'.join(self.choices)}]"

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value, and what to give instead; None if it is valid."""
        is_optional = types.NoneType in self.types
        if (value is None and is_optional) or (isinstance(value, bool) and bool in self.types):
            return None
        if self.choices and value not in self.choices:
            left_out = ", or leave it out" if is_optional else ""
            given = option(**{self.name: value}) if self.option.help else f"{self.name}={value!r}"
            return f"{given} is not available; take {' or '.join(map(repr, self.choices))}{left_out}"
        name = option(self.name) if self.option.help else self.name
        if self.is_flag:
            return f"{name} must be True or False, but got {value!r:.80}"
        if self.option.least is not None and (type(value) is not int or value < self.option.least):
            return f"{name} must be a whole number of at least {self.option.least}, but got {shown(value)}"
        if Path in self.types and not isinstance(value, (str, Path)):
            return f"{name} must be the path of a directory or None, but got {value!r:.80}"
        return self.option.problem(value)


def declared_options(record: type) -> tuple[DeclaredOption, ...]:
    """Return the options of a record, in the order of its fields."""
    hints = typing.get_type_hints(record, include_extras=True)
    found = []
    for field in dataclasses.fields(record):
        hint = hints[field.name]
        if typing.get_origin(hint) is Annotated:
            kind, *notes = typing.get_args(hint)
            found += [DeclaredOption(field.name, kind, field.default, note) for note in notes if type(note) is Option]
    return tuple(found)


def check_options(record: Any, error: type[GraloraError]) -> None:
    """Check every option of a record by itself."""
    for declared in declared_options(type(record)):
        if problem := declared.problem(getattr(record, declared.name)):
            raise error(problem)
