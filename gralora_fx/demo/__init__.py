"""The demonstration: MiniLM learns to sort BBC news, and a small hybrid to write them; both answer on ONNX Runtime."""

from gralora_fx.demo.run import run

__all__ = ["run"]
