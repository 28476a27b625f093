"""The graph of rows: one token stream for many rows, with a cache of their own for each."""
