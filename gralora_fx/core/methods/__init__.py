"""The mathematics of adapters, one method per file, behind one protocol."""

from typing import TYPE_CHECKING

from gralora_fx import first_use
from gralora_fx.core.methods.method import (
    AdapterMethod,
    AdapterTensors,
    LayerCall,
    LowRankTensors,
    Sizes,
    SummableMethod,
    Update,
    WeightTensors,
    first_tensor,
)
from gralora_fx.core.methods.registry import method_of, register

if TYPE_CHECKING:
    from gralora_fx.core.methods.dora import DoraConfig
    from gralora_fx.core.methods.lora import LoraConfig
    from gralora_fx.core.methods.saved_configs import (
        config_from_fields,
        config_from_peft,
        method_described,
        not_a_config,
        read_config,
    )

    METHODS: list[AdapterMethod]

__all__ = [
    "METHODS",
    "AdapterMethod",
    "AdapterTensors",
    "DoraConfig",
    "LayerCall",
    "LoraConfig",
    "LowRankTensors",
    "Sizes",
    "SummableMethod",
    "Update",
    "WeightTensors",
    "config_from_fields",
    "config_from_peft",
    "first_tensor",
    "method_described",
    "method_of",
    "not_a_config",
    "read_config",
    "register",
]

_HOMES = {  # loaded on first use
    "DoraConfig": "core.methods.dora",
    "LoraConfig": "core.methods.lora",
    "METHODS": "core.methods.registry",
    "config_from_fields": "core.methods.saved_configs",
    "config_from_peft": "core.methods.saved_configs",
    "method_described": "core.methods.saved_configs",
    "not_a_config": "core.methods.saved_configs",
    "read_config": "core.methods.saved_configs",
}

__getattr__ = first_use(__name__, _HOMES)
