"""Requests of many callers, batched: text with continuous batching, calls of encoders with dynamic batching."""
