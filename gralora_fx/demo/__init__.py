"""The demo: MiniLM learns to classify BBC news, a small hybrid model to write them; both run on ONNX Runtime."""
