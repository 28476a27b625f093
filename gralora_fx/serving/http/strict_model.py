"""The base of requests: fields are known and of their own types, and a wrong request costs no more than a right one.

Pydantic describes every wrong item of a list and every unknown field, which for a body of some megabytes are gigabytes.
So lists of requests end at their first wrong item (`fail_fast`), and of unknown fields one is looked at.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Item = TypeVar("_Item")

ListOf = Annotated[list[_Item], Field(fail_fast=True)]


class StrictModel(BaseModel):
    """A request, or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        """Leave out what has no effect, and all unknown fields but the first, by which the request is refused."""
        if not isinstance(given, dict):
            return given
        fields = cls._effective(given)
        unknown = [name for name in fields if name not in cls.model_fields]
        for name in unknown[1:]:
            del fields[name]
        return fields

    @classmethod
    def _effective(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The fields that have an effect, as a new dict."""
        return dict(given)
