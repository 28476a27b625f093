"""Text generation: prompts, token choice, generation rules, detokenization."""
