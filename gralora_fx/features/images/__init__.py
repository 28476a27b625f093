"""Images: models that read pixels, and decoders that take what images put in the place of tokens."""
