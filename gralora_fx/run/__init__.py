"""An opened export: sessions, adapters as data, the engine and generation."""
