"""OpenAI's protocol, with vLLM's and Cohere's additions: text, embeddings, classification, reranking and models."""
