"""Passes over a fresh trace."""
