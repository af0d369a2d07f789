"""The brain: which tokens of which requests are computed next, and where their keys and values lie. No tensors here."""
