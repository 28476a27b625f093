"""Attention and rotary embeddings fused; the torch.fx half beside the ONNX half."""
