"""From a `torch.fx` graph to an ONNX model."""
