"""Images: models that read pixels, and decoders that take image embeddings in place of tokens."""
