"""Traces models to `TracedModel`: example inputs, capture, and the modes of a traced graph."""
