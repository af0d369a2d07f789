"""Floor 3, the muscle: plans in, tokens out. Knows no request policy."""
