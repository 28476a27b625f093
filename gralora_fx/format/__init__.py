"""The contents of an export directory, shared by its writer and its readers."""
