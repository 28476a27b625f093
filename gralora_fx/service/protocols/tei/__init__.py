"""Text Embeddings Inference's routes, with an adapter a request: embeddings, ranks and classes."""
