"""OpenAI's protocol, with vLLM's and Cohere's additions: text, speech, embeddings, classes, rankings, and models."""
