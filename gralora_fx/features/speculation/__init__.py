"""Speculative decoding: propose tokens that repeat earlier text, and verify several in a step."""
