"""Rotary embeddings whose frequencies depend on the length of the whole text (LongRoPE, dynamic NTK)."""
