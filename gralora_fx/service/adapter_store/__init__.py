"""The adapters of a service: loaded, used by requests, and evicted."""
