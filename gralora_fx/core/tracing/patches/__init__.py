"""Patches that are applied while a trace runs, and reverted when it ends."""
