"""Structured outputs: answers that meet a JSON schema, match an expression, are one of some, or follow a grammar."""
