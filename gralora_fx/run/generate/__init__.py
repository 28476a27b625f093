"""Prompts to answers: tokens chosen, rules, texts."""
