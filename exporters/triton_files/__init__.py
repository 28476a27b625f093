"""The files of a Triton model repository."""
