"""Delegation of a method to a part of its object."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def delegate(
    part: str, method: Callable[Concatenate[Any, _Arguments], _Result]
) -> Callable[Concatenate[Any, _Arguments], _Result]:
    """A method that calls a part's, with the signature and the documentation of that.

    Args:
        part: Name of the attribute that holds the part.
        method: The method, as the part's class defines it.
    """

    @functools.wraps(method)
    def delegated(self: Any, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        result: _Result = getattr(getattr(self, part), method.__name__)(*args, **kwargs)
        return result

    return delegated
