"""Fields of a JSON file that an export writes, each taken with its type; of another, the error names the place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

from gralora_fx.errors import GraloraError

_Record = TypeVar("_Record")
TEXT_OR_NONE = (str, type(None))
_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": TEXT_OR_NONE,
    "bool": (bool,),
    "bool | None": (bool, type(None)),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (float,),
    "float | None": (float, type(None)),
}  # of a record's fields, by their annotations


@dataclass(frozen=True)
class JsonFields:
    """An object of a file.

    Attributes:
        fields: Its fields.
        path: The file.
        error: The type of errors.
        place: Where the object is in the file, such as `quality.outputs.0`; empty for the whole.
    """

    fields: Mapping[str, Any]
    path: Path
    error: type[GraloraError]
    place: str = ""

    def take(self, name: str, *kinds: type, default: Any = ...) -> Any:
        """A field of one of some types; `default` where the file lacks it.

        Raises:
            GraloraError: It is missing, or of another type.
        """
        if name not in self.fields and default is not ...:
            return default
        value = self.fields.get(name, ...)
        if type(value) not in kinds:
            self.refuse(name, value)
        return value

    def within(self, name: str) -> Self:
        """The object that a field is."""
        return dataclasses.replace(self, fields=self.take(name, dict), place=self._place(name))

    def objects(self, name: str) -> list[Mapping[str, Any]]:
        """The objects that a field lists; none where the file lacks it."""
        found: list[Mapping[str, Any]] = self.take(name, list, default=[])
        if wrong := [entry for entry in found if not isinstance(entry, dict)]:
            self.refuse(name, wrong[0])
        return found

    def record(self, kind: type[_Record]) -> _Record:
        """The object as a dataclass of texts, numbers and flags; fields with a default may be missing."""
        found = dataclasses.fields(kind)  # type: ignore[arg-type]
        defaults = {field.name: field.default for field in found if field.default is not dataclasses.MISSING}
        return kind(
            **{
                field.name: self.take(field.name, *_TYPES[str(field.type)], default=defaults.get(field.name, ...))
                for field in found
            }
        )

    def records(self, name: str, kind: type[_Record]) -> tuple[_Record, ...]:
        """The objects that a field lists, likewise."""
        places = enumerate(self.objects(name))
        return tuple(
            dataclasses.replace(self, fields=fields, place=f"{self._place(name)}.{index}").record(kind)
            for index, fields in places
        )

    def refuse(self, name: str, value: Any) -> NoReturn:
        """Raise the error for a field that is missing (`...`) or has a value that no export writes."""
        what = "is missing" if value is ... else f"is {value!r:.80}, which no export writes"
        raise self.error(f"{self.path}: {self._place(name)} {what}; export the model again")

    def _place(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name
