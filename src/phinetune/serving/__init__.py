"""Talking to a model: a chat session. Knows nothing of workflows or terminals."""
