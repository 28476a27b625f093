"""The adapters in a rewritten graph: one with its tensors, all of them with their state, sums of several."""
