"""Bases with linear layers quantized by GPTQ, AWQ, compressed-tensors or FP8."""
