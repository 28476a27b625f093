"""A model with a cache as rows that open, read tokens in steps and close: all that generates or verifies drives it."""
