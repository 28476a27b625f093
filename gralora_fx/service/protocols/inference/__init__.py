"""The Open Inference Protocol, version 2: tensors as JSON, or as bytes by Triton's extension."""
