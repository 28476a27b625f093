"""Sentence encoders: transformers plus the modules that pool one embedding per text, and cross-encoder scores."""
