"""The adapters in a rewritten graph: each one's tensors, the state of all of them, weighted sums."""
