"""Bases whose linear layers GPTQ, AWQ, compressed-tensors or FP8 stored in few bits."""
