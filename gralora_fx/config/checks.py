"""Checks of single configuration values: each refuses with the field, the value and what to give instead."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

from gralora_fx.errors import ConfigError

LARGEST = 2**24  # no layer is as wide


def check_integer(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number from `least` on."""
    if isinstance(value, int) and value > LARGEST:
        raise ConfigError(f"{name} must be at most {LARGEST}, but got {value}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least else "a non-negative integer"
        raise ConfigError(f"{name} must be {kind}, but got {value!r}")


def check_number(name: str, value: object) -> None:
    """Refuse what is no finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or abs(value) > 1e300 or not math.isfinite(value):  # type: ignore[arg-type]
        raise ConfigError(f"{name} must be a finite number, but got {value!r}")


def check_names(name: str, values: Iterable[object]) -> None:
    """Refuse what is no list of non-empty strings."""
    for value in values:
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"{name} must hold non-empty strings, but it holds {value!r}; name modules as in the model"
            )


def check_expressions(name: str, values: Iterable[str]) -> None:
    """PEFT puts these names into regular expressions as they are."""
    for value in values:
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{name} holds {value!r}, which is no valid name ({error}); name modules") from error


def check_pattern(name: str, value: object, check_value: Callable[[str, object], None]) -> None:
    """Refuse what is no dict from module names (or regular expressions) to valid values."""
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a dict from module names to values, but got {value!r}")
    check_names(name, value)
    check_expressions(name, value)
    for key, entry in value.items():
        check_value(f"{name}[{key!r}]", entry)
