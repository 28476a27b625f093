"""The service on several processes."""
