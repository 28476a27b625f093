"""Protocols of the service, one folder each."""
