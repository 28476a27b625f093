"""ONNX Runtime sessions over an export directory."""

from gralora_fx.engine.decoder import Decoder
from gralora_fx.serving.call_arrays import Outputs
from gralora_fx.serving.model import OrtModel, load

__all__ = ["Decoder", "OrtModel", "Outputs", "load"]
