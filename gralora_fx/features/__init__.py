"""Capabilities that not every model needs, a folder each; nothing outside imports them (`gralora_fx.base.features`)."""
