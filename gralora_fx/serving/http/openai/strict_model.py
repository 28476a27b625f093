"""What every request as JSON is: strict in its fields, and cheap to refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

_Item = TypeVar("_Item")

ListOf = Annotated[list[_Item], Field(fail_fast=True)]
Idle: TypeAlias = Mapping[str, tuple[Any, ...] | None]


class StrictModel(BaseModel):
    """A request, or a part of one: fields are known and of their own types, and one that is null is as if left out.

    A wrong request costs no more than a right one. Pydantic describes every wrong item of a list and every unknown
    field, which for a body of some megabytes are gigabytes: so lists of requests end at their first wrong item
    (`fail_fast`), and of unknown fields one is looked at.

    Attributes:
        without_effect: Fields beside them that are accepted, since they change no answer; of some only these values.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    without_effect: ClassVar[Idle] = {}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, body: Any) -> Any:
        """Leave out what has no effect, and all unknown fields but the first, by which the request is refused."""
        if not isinstance(body, dict):
            return body
        idle, known = cls.without_effect, {field.alias or name for name, field in cls.model_fields.items()}
        fields = {
            name: value
            for name, value in body.items()
            if value is not None and not (name in idle and _is_among(value, idle[name]))
        }
        for name in [name for name in fields if name not in known][1:]:
            del fields[name]
        return fields


def wrong_field(field: str, kind: str, problem: str) -> ValidationError:
    """An error of a field that is wrong beside others, for a validator to raise.

    Args:
        field: The field.
        kind: The kind of error, as pydantic's `missing`.
        problem: What is wrong.
    """
    # in braces a problem would be taken for a template
    error = PydanticCustomError(kind, "{problem}", {"problem": problem})
    return ValidationError.from_exception_data(field, [InitErrorDetails(type=error, loc=(field,), input=None)])


def _is_among(value: Any, values: tuple[Any, ...] | None) -> bool:
    """Whether a field has one of some values, of the same type; None for any."""
    return values is None or any(type(value) is type(other) and value == other for other in values)
