"""Foundations of every stage: private API of other packages, progress display, sources of weights and files."""
