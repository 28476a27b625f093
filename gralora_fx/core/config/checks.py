"""Names that PEFT's files have, and checks of single values and of adapters' names, each with a remedy."""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterable
from typing import Any

from gralora_fx.base.sources import ADAPTER_FILE
from gralora_fx.errors import ConfigError, shown

CONFIG_NAME = ADAPTER_FILE
ALL_LINEAR = "all-linear"
KEY_PREFIX = "base_model.model."  # of every key of an adapter's tensors in PEFT's file
LARGEST = 2**24  # no layer is that wide


def check_integer(name: str, value: object, least: int) -> None:
    """Check that a value is an integer of at least `least`."""
    if isinstance(value, int) and value > LARGEST:
        raise ConfigError(f"{name} must be at most {LARGEST}, but got {shown(value)}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least else "a non-negative integer"
        raise ConfigError(f"{name} must be {kind}, but got {shown(value)}")


def is_number(value: object) -> bool:
    """Whether a value is a finite number in the range of a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= 1e300 and math.isfinite(value)


def check_number(name: str, value: object) -> None:
    """Check that a value is a finite number."""
    if not is_number(value):
        raise ConfigError(f"{name} must be a finite number, but got {shown(value)}")


def check_alpha(name: str, value: Any) -> None:
    """Check that a value is a positive number: with 0 an adapter would never have an effect."""
    check_number(name, value)
    if value <= 0:
        raise ConfigError(f"{name} must be positive, but got {shown(value)}: it scales the adapter's output")


def check_dropout(name: str, value: Any) -> None:
    """Refuse what is not a probability below 1."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ConfigError(f"{name} must be in [0, 1), but got {value}; take 0 for none")


def check_flag(name: str, value: object) -> None:
    """Refuse what is not True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, but got {shown(value)}")


def check_names(name: str, values: Iterable[object]) -> None:
    """Check that values are non-empty strings."""
    for value in values:
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"{name} must hold non-empty strings, but it holds {shown(value)}; name modules as in the model"
            )


def check_parameters(names: object, dropout: str, probability: float) -> None:
    """Check `target_parameters`: a list of names, beside which there is no dropout."""
    if names is None:
        return
    if not isinstance(names, list):
        raise ConfigError(f"target_parameters must be a list of names or None, but got {shown(names)}")
    check_names("target_parameters", names)
    if names and probability:
        raise ConfigError(
            f"{dropout}={probability} does not work with target_parameters={shown(names)}: dropout acts on the input "
            f"of a layer, and an adapter of a parameter has none; set {dropout} to 0, as PEFT requires"
        )


def _unfit_name(name: object) -> ConfigError:
    """The error for a name that cannot be one of an adapter."""
    return ConfigError(
        f"{name!r} cannot name an adapter; use letters, digits, _ and -, no dots, no attribute of nn.Module and no "
        "Python keyword"
    )


def check_adapter_letters(name: object) -> None:
    """Check that a name can be part of an attribute path, of code and of a file path, as far as its letters tell."""
    is_fit = (
        isinstance(name, str)
        and bool(name)
        and name.isprintable()
        and not set(name) & set("./\\'\"")
        and not keyword.iskeyword(name)
    )
    if not is_fit:
        raise _unfit_name(name)


def check_adapter_name(name: object) -> None:
    """Check that a name can be part of an attribute path, of code and of a file path."""
    from torch import nn

    check_adapter_letters(name)
    if hasattr(nn.Module(), str(name)):
        raise _unfit_name(name)
