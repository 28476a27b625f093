"""Tracing of models to `TracedModel`: capture, example inputs, and the mode of a traced graph."""
