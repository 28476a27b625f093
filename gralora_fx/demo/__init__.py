"""The demo: MiniLM learns to classify BBC news, a small hybrid model to write them; both run on ONNX Runtime."""

from gralora_fx.demo.run import run

__all__ = ["run"]
