"""LLM.int8: bases that bitsandbytes stored in eight bits, or that are rounded as it does."""
