"""Reads JSON objects into dataclasses, whose annotations declare each field; an error names the place.

A field is a text, a number, a flag, another such dataclass, a `Mapping` by name, a `tuple` or `Any`; or one of them or
None. `Annotated[str, ("a", "b")]` allows only these values. A field with a default may be missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

_Record = TypeVar("_Record")
MISSING = dataclasses.MISSING
Count: TypeAlias = Annotated[int, range(2**63)]  # not below 0


class FieldError(Exception):
    """A field is missing, or has an invalid value.

    Attributes:
        place: Its place in the file, such as `quality.outputs.0.name`.
        value: Its value; `MISSING` for none.
    """

    def __init__(self, place: str, value: object) -> None:
        problem = "is missing" if value is MISSING else f"is {value!r:.80}, which no export writes"
        super().__init__(f"{place} {problem}")
        self.place, self.value = place, value


def read_object(kind: type[_Record], fields: Mapping[str, Any], place: str = "") -> _Record:
    """Convert an object to a dataclass; unknown fields are ignored."""
    return kind(**{field.name: _taken(field, hint, fields, place) for field, hint in _declared(kind)})  # type: ignore[arg-type]


def wrong_fields(kind: type[Any], fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of all fields for which `read_object` would raise."""
    for field, hint in _declared(kind):  # type: ignore[arg-type]
        try:
            _taken(field, hint, fields, "")
        except FieldError:
            yield field.name


def _taken(field: dataclasses.Field[Any], hint: Any, fields: Mapping[str, Any], place: str) -> Any:
    if field.name not in fields:
        if field.default is not MISSING:
            return field.default
        if field.default_factory is not MISSING:
            return field.default_factory()
    return _converted(hint, fields.get(field.name, MISSING), f"{place}.{field.name}" if place else field.name)


def _converted(hint: Any, value: Any, place: str) -> Any:
    """Convert a value of a file to a field's type."""
    if type(value) is hint:  # a text, a number or a flag, as most values are
        return value
    if not _fits(hint, value):
        raise FieldError(place, value)
    if dataclasses.is_dataclass(hint):
        return read_object(hint, value, place)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (other,) = (arg for arg in args if arg is not NoneType)
        return None if value is None else _converted(other, value, place)
    if origin is Mapping:
        return {name: _converted(args[1], item, f"{place}.{name}") for name, item in value.items()}
    if origin is tuple:
        if args[1:] == (...,) and _are_plain(args[0], value):
            return tuple(value)
        kinds = [args[0]] * len(value) if args[1:] == (...,) else args
        if wrong := [item for item, kind in zip(value, kinds, strict=True) if not _fits(kind, item)]:
            raise FieldError(place, wrong[0])
        return tuple(
            _converted(kind, item, f"{place}.{index}")
            for index, (item, kind) in enumerate(zip(value, kinds, strict=True))
        )
    return value


def _are_plain(hint: Any, items: list[Any]) -> bool:
    """Return whether items are texts or numbers of a type that need no conversion; fast, for thousands of them."""
    if hint is Count:
        return all(type(item) is int and 0 <= item < 2**63 for item in items)
    return hint in (str, int, float) and all(type(item) is hint for item in items)


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a value is of a type, not checking its items."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value is not MISSING
    if origin is Annotated:
        return _fits(args[0], value) and value in args[1]
    if origin in (Union, UnionType):
        return any(_fits(arg, value) for arg in args)
    if origin is tuple:
        return type(value) is list and (args[1:] == (...,) or len(value) == len(args))
    return type(value) is (dict if origin is Mapping or dataclasses.is_dataclass(hint) else hint)


@cache
def _declared(kind: type[Any]) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    """Return the fields of a dataclass, each with its type."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple((field, hints[field.name]) for field in dataclasses.fields(kind))
