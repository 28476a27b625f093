"""OpenAI's protocol, with vLLM's and Cohere's additions: text, embeddings, classes, rankings, and models."""
