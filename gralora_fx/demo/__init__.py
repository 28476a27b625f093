"""The demonstration: MiniLM learns to sort BBC news with GraLoRA, and answers on ONNX Runtime."""

from gralora_fx.demo.run import run

__all__ = ["run"]
