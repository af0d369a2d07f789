"""Floor 4: the one floor that knows both towers."""
