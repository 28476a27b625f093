"""Adapters as inputs of a graph."""
