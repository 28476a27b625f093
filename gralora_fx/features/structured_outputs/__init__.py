"""Structured outputs: answers constrained by a JSON schema, a regular expression, a list of choices, or a grammar."""
