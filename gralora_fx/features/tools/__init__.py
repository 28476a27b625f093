"""Calls of tools in answers to chats: described to the model, constrained to their schemas, read as they come."""
