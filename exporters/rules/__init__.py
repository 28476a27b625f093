"""Passes over the ONNX model."""
