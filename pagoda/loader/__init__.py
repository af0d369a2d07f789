"""Floor 1: weights from files into layers, one tensor at a time."""
