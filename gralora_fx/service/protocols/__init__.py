"""Protocols of the service, a folder each."""
