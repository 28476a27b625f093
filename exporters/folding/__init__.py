"""Folding of adapters into the weights of exported ONNX files, without a model: where weights lie, and their bytes."""
