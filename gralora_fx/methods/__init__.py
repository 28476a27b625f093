"""Adapter mathematics, one method a file, behind one protocol."""

from gralora_fx.methods.method import AdapterDims, AdapterMethod, AdapterTensors, SummableMethod, Update, first_tensor
from gralora_fx.methods.registry import (
    METHODS,
    config_from_fields,
    config_from_peft,
    method_named,
    method_of,
    not_a_config,
    read_config,
    register,
)

__all__ = [
    "METHODS",
    "AdapterDims",
    "AdapterMethod",
    "AdapterTensors",
    "SummableMethod",
    "Update",
    "config_from_fields",
    "config_from_peft",
    "first_tensor",
    "method_named",
    "method_of",
    "not_a_config",
    "read_config",
    "register",
]
