"""Opening of an export directory: its manifest, ONNX Runtime sessions and values, names, context length."""
