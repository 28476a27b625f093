"""What to adapt and how: the configurations, and PEFT's `adapter_config.json`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gralora_fx.config.adapter_config import AdapterConfig
    from gralora_fx.config.checks import CONFIG_NAME
    from gralora_fx.config.gralora_config import GraloraConfig

__all__ = ["CONFIG_NAME", "AdapterConfig", "GraloraConfig"]

# imported on first use: serving reads settings beside them
_HOMES = {"AdapterConfig": "adapter_config", "CONFIG_NAME": "checks", "GraloraConfig": "gralora_config"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gralora_fx.config' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"gralora_fx.config.{_HOMES[name]}"), name)
    return value
