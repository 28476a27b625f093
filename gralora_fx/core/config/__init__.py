"""The configurations of adapters: what to adapt and how, and PEFT's `adapter_config.json`."""

from typing import TYPE_CHECKING

from gralora_fx import first_use

if TYPE_CHECKING:
    from gralora_fx.core.config.adapter_config import AdapterConfig
    from gralora_fx.core.config.checks import CONFIG_NAME
    from gralora_fx.core.config.gralora_config import GraloraConfig

__all__ = ["CONFIG_NAME", "AdapterConfig", "GraloraConfig"]

# imported on first use: serving reads settings beside them
_HOMES = {
    "AdapterConfig": "core.config.adapter_config",
    "CONFIG_NAME": "core.config.checks",
    "GraloraConfig": "core.config.gralora_config",
}

__getattr__ = first_use(__name__, _HOMES)
