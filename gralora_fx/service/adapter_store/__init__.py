"""Adapters of the service: load, hold while requests run, evict."""
