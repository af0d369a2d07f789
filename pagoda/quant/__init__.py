"""Floor 1: how a linear layer's weight is stored, packed and multiplied."""
