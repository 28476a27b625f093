"""Batching across callers: continuous batching for text, dynamic batching for encoders."""
