"""An export directory opened: its manifest, ONNX Runtime sessions and values, names and context length."""
