"""Prompts to answers: tokens chosen, rules, drafts, texts."""
