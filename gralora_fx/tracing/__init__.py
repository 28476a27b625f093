"""Model to `TracedModel`: tracing, example inputs, and the mode of a traced graph."""
