"""The options of a command that a record declares: the same as the arguments of the function that it calls."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from gralora_fx.cli.values import utf8
from gralora_fx.config.option import DeclaredOption, declared_options

_ARGUMENT = re.compile(r"\b([a-z_]+)=\.\.\.")  # as a text of the library names one
Declared = Any  # the type of a command's parameter that is an option which its record declares, default included
_Command = TypeVar("_Command", bound=Callable[..., None])


def takes(record: type) -> Callable[[_Command], _Command]:
    """A command with an option for each that a record declares.

    They come after the command's own positional parameters and before its keyword-only ones, and the command gets them
    as `**options`. One that the command names itself comes there, and is given by that name.

    Args:
        record: The dataclass that declares the options.
    """
    declared = {option.name: _parameter(option) for option in declared_options(record) if option.option.help}

    def with_options(command: _Command) -> _Command:
        own = inspect.signature(command, eval_str=True).parameters
        first = [name for name, parameter in own.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        last = [name for name, parameter in own.items() if parameter.kind is parameter.KEYWORD_ONLY]
        between = [name for name in declared if name not in own]
        parameters = [{**own, **declared}[name] for name in (*first, *between, *last)]
        keywords = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
        vars(command)["__signature__"] = inspect.Signature(keywords)
        for name in declared.keys() & own.keys():
            del command.__annotations__[name]  # typer would look there first
        return command

    return with_options


def _parameter(declared: DeclaredOption) -> inspect.Parameter:
    """An option as a parameter that typer reads; a choice is a text, whose check is the record's."""
    option = declared.option
    text = _ARGUMENT.sub(lambda found: f"--{found[1].replace('_', '-')}", option.help)
    info: dict[str, Any] = {"help": f"{text}  [default: {option.left_out}]" if option.left_out else text}
    info |= {"rich_help_panel": option.group} if option.group else {}
    if declared.is_flag:
        kind: Any = bool
    else:
        kind = str if declared.choices else next(k for k in (Path, int, float, str) if k in declared.types)
        info |= {"metavar": declared.metavar, "min": option.least, "envvar": option.environment or None}
        info |= {"callback": utf8} if kind in (Path, str) and not declared.choices else {}
    default = declared.default if declared.is_flag or isinstance(declared.default, kind) else None
    annotation: Any = Annotated[kind if default is not None else kind | None, typer.Option(declared.flag, **info)]
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(declared.name, place, default=default, annotation=annotation)
