"""The public names, and what of them has no documentation."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from gralora_fx import errors

MODULES = ("gralora_fx", "gralora_fx.exporters", "gralora_fx.serving", "gralora_fx.peft", "gralora_fx.errors")
_SECTION = r"^{}:\n((?:    .*\n|\n)*)"  # of a docstring in Google's style
_ENTRY = re.compile(r"^    \*{0,2}(\w+)(?: \([^)]*\))?:", re.MULTILINE)


def public_names(module: str) -> list[str]:
    """Return the names that a module's page describes: those of its `__all__`; of `errors`, its errors and warnings."""
    if module != errors.__name__:
        return list(importlib.import_module(module).__all__)
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    return [value.__name__ for value in found if issubclass(value, errors.GraloraError | Warning)]


def undocumented() -> list[str]:
    """Every public name, method, field and parameter that its docstring leaves out, and every entry of none."""
    return [
        problem
        for module in MODULES
        for name in public_names(module)
        for problem in problems(f"{module}.{name}", getattr(importlib.import_module(module), name))
    ]


def problems(place: str, value: Any) -> Iterator[str]:
    """Yield what the docstring of a class or a function leaves out.

    Args:
        place: Its name, for the problem.
        value: The class or the function.
    """
    if not inspect.isclass(value):
        yield from _of_function(place, value)
        return
    if not value.__doc__ or value.__doc__.startswith(f"{value.__name__}("):  # what a dataclass writes by itself
        yield f"{place} has no docstring"
        return
    texts = [base.__doc__ or "" for base in value.__mro__ if dataclasses.is_dataclass(base)] or [value.__doc__]
    described = {name for text in texts for title in ("Args", "Attributes") for name in _entries(text, title)}
    fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    for name in fields:
        if not name.startswith("_") and name not in described:
            yield f"{place} does not describe its field {name}"
    for name, member in vars(value).items():
        if not name.startswith("_"):
            yield from _of_member(f"{place}.{name}", member)


def _of_member(place: str, member: Any) -> Iterator[str]:
    if isinstance(member, property | functools.cached_property):
        if not member.__doc__:
            yield f"{place} has no docstring"
    elif inspect.isfunction(member) or isinstance(member, classmethod | staticmethod):
        yield from _of_function(place, getattr(member, "__func__", member))


def _of_function(place: str, function: Any) -> Iterator[str]:
    text = inspect.getdoc(function)
    if not text:
        yield f"{place} has no docstring"
        return
    parameters = inspect.signature(function).parameters
    takes = [name for name in parameters if name not in ("self", "cls") and not name.startswith("_")]
    described = _entries(text, "Args")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if left_out := [name for name in takes if name not in described]:
        yield f"{place} does not describe {', '.join(left_out)} under Args"
    if unknown := [name for name in described if name not in takes and not takes_any]:
        yield f"{place} describes {', '.join(unknown)}, which it does not take"


def _entries(text: str, title: str) -> list[str]:
    """Return the names that a section of a docstring describes."""
    section = re.search(_SECTION.format(title), inspect.cleandoc(text) + "\n", re.MULTILINE)
    return _ENTRY.findall(section[1]) if section else []
