"""The protocols that a custom adapter method implements, and `register`."""

from typing import TYPE_CHECKING

from gralora_fx import first_use

if TYPE_CHECKING:
    from gralora_fx.core.config.adapter_config import AdapterConfig
    from gralora_fx.core.methods.method import AdapterMethod, LayerCall, LowRankTensors, Sizes, SummableMethod, Update
    from gralora_fx.core.methods.registry import METHODS, register

__all__ = [
    "METHODS",
    "AdapterConfig",
    "AdapterMethod",
    "LayerCall",
    "LowRankTensors",
    "Sizes",
    "SummableMethod",
    "Update",
    "register",
]

_HOMES = dict.fromkeys(__all__, "core.methods.method") | {
    "AdapterConfig": "core.config.adapter_config",
    "METHODS": "core.methods.registry",
    "register": "core.methods.registry",
}

__getattr__ = first_use(__name__, _HOMES)
