"""Experts as products of the tokens that each one has."""
