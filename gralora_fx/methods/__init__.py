"""Adapter mathematics, one method a file."""
