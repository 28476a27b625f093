"""The graph of rows: one token stream for many rows, each with its own cache."""
