"""Verification: comparison of an export with its model on fresh inputs and tokens, within tolerances."""
