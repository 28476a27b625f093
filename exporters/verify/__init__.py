"""Comparison of an export with its model: inputs, tokens, references, tolerances."""
