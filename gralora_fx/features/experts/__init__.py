"""Mixtures of experts: one operator a layer, of which each token passes those that a router chose for it."""
