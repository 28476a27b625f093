"""Passes over the `torch.fx` graph, before it is translated."""
