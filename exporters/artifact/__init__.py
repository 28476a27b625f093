"""The export directory: staging, manifest, files for other programs."""
