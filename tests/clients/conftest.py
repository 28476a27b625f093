"""Scripts that run in environments of their own, whose packages this one does not have."""

collect_ignore_glob = ["*.py"]
