"""Code that every stage stands on: private API of other packages, progress, sources of weights and files."""
