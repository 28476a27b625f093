"""Sentence encoders: transformers with the modules that make one embedding of a text, and scores of cross-encoders."""
