"""Kinds of exports: without a cache, a decoder with one, an encoder-decoder."""
