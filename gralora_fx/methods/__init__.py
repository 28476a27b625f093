"""Adapter mathematics, one method a file, behind one protocol."""

from gralora_fx.methods.dora import DoraConfig
from gralora_fx.methods.lora import LoraConfig
from gralora_fx.methods.method import (
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
from gralora_fx.methods.registry import (
    METHODS,
    config_from_fields,
    config_from_peft,
    method_described,
    method_of,
    not_a_config,
    read_config,
    register,
)

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
