"""ONNX Runtime sessions over an export directory."""
