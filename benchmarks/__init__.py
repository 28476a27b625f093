"""Benchmarks, each a file with a `run() -> Report`; `python -m benchmarks` runs them."""
