"""ONNX Runtime sessions over an export directory."""

from gralora_fx.engine.decoder import Decoder
from gralora_fx.serving.model import OrtModel, load
from gralora_fx.serving.outputs import Outputs

__all__ = ["Decoder", "OrtModel", "Outputs", "load"]
