"""Export flavours: models without a cache, decoders with one, encoder-decoders."""
