"""ONNX Runtime sessions over an export directory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gralora_fx.engine.decoder import Decoder
    from gralora_fx.serving.call_arrays import Outputs
    from gralora_fx.serving.model import OrtModel, load

__all__ = ["Decoder", "OrtModel", "Outputs", "load"]

_HOMES = {
    "Decoder": "gralora_fx.engine.decoder",
    "OrtModel": "gralora_fx.serving.model",
    "Outputs": "gralora_fx.serving.call_arrays",
    "load": "gralora_fx.serving.model",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gralora_fx.serving' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value
