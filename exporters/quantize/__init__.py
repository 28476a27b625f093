"""Quantization: formats of weights, their arithmetic, and the plan that assigns one to every matrix."""
