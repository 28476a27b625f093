"""Graph passes for adapters, one a file, in place over a `GraphModule`, which must be recompiled afterwards."""
