"""Floor 5: the engine for Python programs: `LLM` for batches, `AsyncEngine` for streams. Text comes in, text goes out."""
