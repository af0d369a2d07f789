"""Which files hold weights. A module of its own so that looking a name up does not import an array library."""

from __future__ import annotations

__all__ = ["PICKLE_SUFFIXES"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # loading one runs whatever code it holds
