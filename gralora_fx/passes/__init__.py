"""Graph passes, one a file; each leaves a graph that lints."""
