"""Configurations of any method from files and from PEFT's objects, and errors for other objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.methods.method import AdapterMethod
from gralora_fx.core.methods.registry import known_methods, unknown_method
from gralora_fx.errors import an


def method_described(fields: Mapping[str, Any], origin: str) -> AdapterMethod:
    """Return the method that the fields of an `adapter_config.json` describe."""
    for method in reversed(known_methods()):
        if method.config.describes(fields):
            return method
    raise unknown_method(origin, fields.get("peft_type"))


def config_from_fields(fields: Mapping[str, Any], origin: str) -> AdapterConfig:
    """Return the configuration with the fields of a file, in the class of their method."""
    return method_described(fields, origin).config.from_fields(fields, origin)


def read_config(directory: str | Path, *, revision: str | None = None) -> AdapterConfig:
    """Read the configuration of a saved adapter of any method."""
    from gralora_fx.core.config.reading import config_fields

    return config_from_fields(*config_fields(directory, revision=revision))


def config_from_peft(peft_config: Any) -> AdapterConfig:
    """Convert a live PEFT configuration of any method, without importing peft."""
    from gralora_fx.core.config.reading import peft_fields

    return config_from_fields(*peft_fields(peft_config, "one such as a peft.GraloraConfig or peft.LoraConfig"))


def not_a_config(value: object) -> str:
    """Describe, for a message, a value given in place of a configuration of this package, and what to give."""
    names = [an(method.config.__name__) for method in known_methods()]
    if isinstance(value, type):
        return f"the class {value.__name__}; give an object of it, such as {value.__name__}()"
    kind = type(value)
    name = getattr(value, "peft_type", None)
    if name is None:
        return f"{an(kind.__name__)} ({kind.__module__}); give one of gralora_fx: {' or '.join(names)}"
    owner = kind.__module__.partition(".")[0]
    from gralora_fx.core.config.reading import peft_fields

    fields, _ = peft_fields(value, "")
    ours = next((method.config for method in reversed(known_methods()) if method.config.describes(fields)), None)
    if ours is None:
        return f"{owner}'s {kind.__name__}, whose method is not supported; give {' or '.join(names)} of gralora_fx"
    return (
        f"{owner}'s {kind.__name__} ({kind.__module__}); convert it with {ours.__name__}.from_peft(config), where "
        f"{ours.__name__} is that of {ours.__module__.partition('.')[0]}"
    )
