"""Speculation: tokens that an answer repeats are proposed, and verified several in a step."""
