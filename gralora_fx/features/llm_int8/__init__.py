"""LLM.int8: bases stored in bitsandbytes' eight bits, or rounded to them."""
