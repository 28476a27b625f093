"""The decoder engine: rows (batch slots) open, read tokens in steps and close."""
