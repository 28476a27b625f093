"""ONNX Runtime sessions over an export directory."""

from gralora_fx.serving.batched_decoder import BatchedDecoder
from gralora_fx.serving.model import OrtModel, load
from gralora_fx.serving.outputs import Outputs

__all__ = ["BatchedDecoder", "OrtModel", "Outputs", "load"]
