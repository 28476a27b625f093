"""Layers with a state instead of keys and values: linear attention, state space models, causal convolutions."""
