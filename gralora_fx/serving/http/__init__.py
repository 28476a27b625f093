"""The HTTP service over an export directory: OpenAI's protocol for text, the Open Inference Protocol for tensors."""
