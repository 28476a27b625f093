"""Export of rewritten models to ONNX, and what is done with the exports."""
