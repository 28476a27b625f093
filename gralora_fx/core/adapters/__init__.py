"""The adapters in a rewritten graph: single ones and their tensors, the state of all, weighted sums."""
