"""Reasoning: what a model thinks aloud, told from what it answers."""
