"""ONNX Runtime sessions over an export directory."""

from typing import TYPE_CHECKING

from gralora_fx import first_use

if TYPE_CHECKING:
    from gralora_fx.engine.decoder import Decoder
    from gralora_fx.serving.call_arrays import Outputs
    from gralora_fx.serving.model import OrtModel, load

__all__ = ["Decoder", "OrtModel", "Outputs", "load"]

_HOMES = {"Decoder": ".engine.decoder", "OrtModel": "model", "Outputs": "call_arrays", "load": "model"}

__getattr__ = first_use(__name__, _HOMES)
