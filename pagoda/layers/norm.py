"""RMS normalisation with a learned weight, over a row or over each head of it."""

from __future__ import annotations

from typing import Any

from pagoda.kernels import ops
from pagoda.layers.parameter import Vector
from pagoda.loader.place import Place

__all__ = ["RmsNorm"]


class RmsNorm:
    """y = x / rms(x) * w over groups of `size` columns. `plus_one`: the checkpoint stores w - 1 (Gemma)."""

    def __init__(self, size: int, eps: float, *, plus_one: bool = False) -> None:
        self.weight = Vector(size, plus_one=plus_one)
        self._eps = eps

    def slots(self, prefix: str) -> dict[str, Any]:
        return {f"{prefix}.weight": self.weight}

    def finish(self, place: Place) -> None:
        """Called once when the weight is loaded."""
        self.weight.array = place.vector(self.weight.array)

    def __call__(self, x_TD: Any, *, out: Any = None) -> Any:
        return ops.rms_norm(x_TD, self.weight.array, eps=self._eps, out=out)
