"""Contents of an export directory, which its writer and its readers share."""
