"""Kinds of export: models without a cache, decoders with one, encoder-decoders."""
