"""A model with a cache as rows that open, read tokens in steps and close, driven by all that generates or verifies."""
