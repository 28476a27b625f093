"""Mixtures of experts: one operator per layer, in which each token passes the experts that a router chose."""
