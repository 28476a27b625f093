"""The methods that are known: one line each. Another one is added with `register`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from gralora_fx.core.config.adapter_config import AdapterConfig
from gralora_fx.core.methods.gralora import Gralora
from gralora_fx.core.methods.method import AdapterMethod
from gralora_fx.errors import ConfigError, shown

GRALORA = Gralora()
# the methods of this package, by the files that define them; a method comes after one of which it is a special case
_FILES = (
    ("lora", "Lora"),  # plain LoRA and rsLoRA
    ("dora", "Dora"),  # LoRA that trains the norms of the weights' rows too
)
_registered: list[AdapterMethod] = []
_loading = threading.Lock()


def __getattr__(name: str) -> Any:
    """Load every method on first use of `METHODS`, the list of all, to which `register` adds.

    GraLoRA, granular low-rank adaptation, comes first: blocks, and a plain LoRA beside them (hybrid).
    """
    if name != "METHODS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return known_methods()


def known_methods() -> list[AdapterMethod]:
    """Return the list of all methods, to which `register` adds."""
    with _loading:
        if not _registered:
            kinds = [getattr(import_module(f"gralora_fx.core.methods.{file}"), kind) for file, kind in _FILES]
            _registered.extend([GRALORA, *(kind() for kind in kinds)])
    return _registered


def register(method: AdapterMethod) -> AdapterMethod:
    """Make another method known, to plans, checkpoints and exports alike.

    Args:
        method: The method; its `config` tells its adapters from those of the others.

    Returns:
        The method itself.

    Raises:
        ConfigError: Another method of the same name (`PEFT_TYPE`) is registered.
    """
    if any(other.config.PEFT_TYPE == method.config.PEFT_TYPE for other in known_methods()):
        raise ConfigError(
            f"a method {method.config.PEFT_TYPE!r} is registered already; give the configuration another PEFT_TYPE"
        )
    known_methods().append(method)
    return method


def method_of(config: AdapterConfig) -> AdapterMethod:
    """The method of a configuration."""
    if type(config) is GRALORA.config:
        return GRALORA
    for method in reversed(known_methods()):
        if isinstance(config, method.config) and config.PEFT_TYPE == method.config.PEFT_TYPE:
            return method
    raise _unknown(f"the {type(config).__name__}", getattr(config, "peft_type", None))


def method_described(fields: Mapping[str, Any], origin: str) -> AdapterMethod:
    """The method that the fields of an `adapter_config.json` describe."""
    for method in reversed(known_methods()):
        if method.config.describes(fields):
            return method
    raise _unknown(origin, fields.get("peft_type"))


def config_from_fields(fields: Mapping[str, Any], origin: str) -> AdapterConfig:
    """The configuration that the fields of a file mean, of the method that they name."""
    return method_described(fields, origin).config.from_fields(fields, origin)


def read_config(directory: str | Path, *, revision: str | None = None) -> AdapterConfig:
    """The configuration of a saved adapter, of whatever method."""
    from gralora_fx.core.config.reading import config_fields

    return config_from_fields(*config_fields(directory, revision=revision))


def config_from_peft(peft_config: Any) -> AdapterConfig:
    """Convert a live PEFT configuration of whatever method, without importing peft."""
    from gralora_fx.core.config.reading import peft_fields

    return config_from_fields(*peft_fields(peft_config, "one such as a peft.GraloraConfig or peft.LoraConfig"))


def not_a_config(value: object) -> str:
    """What a value is that was given in place of a configuration of this package, and what to give, for a message."""
    names = [method.config.__name__ for method in known_methods()]
    if isinstance(value, type):
        return f"the class {value.__name__}; give an object of it, such as {value.__name__}()"
    kind = type(value)
    name = getattr(value, "peft_type", None)
    if name is None:
        return f"a {kind.__name__} ({kind.__module__}); give one of gralora_fx: a {' or a '.join(names)}"
    owner = kind.__module__.partition(".")[0]
    from gralora_fx.core.config.reading import peft_fields

    fields, _ = peft_fields(value, "")
    ours = next((method.config for method in reversed(known_methods()) if method.config.describes(fields)), None)
    if ours is None:
        return f"{owner}'s {kind.__name__}, whose method is not supported; give a {' or a '.join(names)} of gralora_fx"
    return (
        f"{owner}'s {kind.__name__} ({kind.__module__}); convert it with {ours.__name__}.from_peft(config), where "
        f"{ours.__name__} is that of {ours.__module__.partition('.')[0]}"
    )


def _unknown(origin: str, name: object) -> ConfigError:
    known = ", ".join(dict.fromkeys(method.config.PEFT_TYPE for method in known_methods()))
    return ConfigError(
        f"{origin}: the method {shown(name)} (peft_type) is not registered; registered are {known}. Give an adapter of "
        "one of these, or add the method with gralora_fx.methods.register"
    )
