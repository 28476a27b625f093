"""The known methods, one line each; `register` adds another."""

from __future__ import annotations

import threading
from importlib import import_module
from typing import Any

from gralora_fx.core.config.adapter_config import AdapterConfig
from gralora_fx.core.methods.gralora import Gralora
from gralora_fx.core.methods.method import AdapterMethod
from gralora_fx.errors import ConfigError, shown

GRALORA = Gralora()
# the methods of this package, by the files that define them; a special case comes after its general method
_FILES = (
    ("lora", "Lora"),  # plain LoRA and rsLoRA
    ("dora", "Dora"),  # LoRA that trains the norms of the weights' rows too
)
_registered: list[AdapterMethod] = []
_loading = threading.Lock()


def __getattr__(name: str) -> Any:
    """Load every method on first use of `METHODS`, the list of all, to which `register` adds.

    GraLoRA comes first: granular low-rank adaptation, in blocks, with a plain LoRA beside them in the hybrid form.
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
    """Register another method, for plans, checkpoints and exports.

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
    """Return the method of a configuration."""
    if type(config) is GRALORA.config:
        return GRALORA
    for method in reversed(known_methods()):
        if isinstance(config, method.config) and config.PEFT_TYPE == method.config.PEFT_TYPE:
            return method
    raise unknown_method(f"the {type(config).__name__}", getattr(config, "peft_type", None))


def unknown_method(origin: str, name: object) -> ConfigError:
    """Return the error for a method that is not registered."""
    known = ", ".join(dict.fromkeys(method.config.PEFT_TYPE for method in known_methods()))
    return ConfigError(
        f"{origin}: the method {shown(name)} (peft_type) is not registered; registered are {known}. Give an adapter of "
        "one of these, or add the method with gralora_fx.methods.register"
    )
