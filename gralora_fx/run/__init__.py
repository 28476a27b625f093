"""An export opened: sessions, adapters as data, the engine and generation."""
