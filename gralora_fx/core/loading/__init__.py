"""Base models, adapters and tokenizers by name, as the command line takes them."""
