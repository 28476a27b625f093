"""The Open Inference Protocol, version 2: tensors as JSON, or as bytes (Triton's binary extension)."""
