"""Who computes which share: ranks along the axes a model is cut, handed to every layer at construction.

Size one along every axis is the default, so that a layer never asks a global where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Axis", "Mesh"]


@dataclass(frozen=True)
class Axis:
    """This process's place along one axis."""

    rank: int = 0
    size: int = 1

    def share(self, total: int, what: str) -> int:
        """Size of this rank's equal part of `total`."""
        assert total % self.size == 0, f"{what} = {total} is not divisible by {self.size} ranks"
        return total // self.size

    def slice_of(self, total: int) -> slice:
        """This rank's interval [start, stop) of `total` equal parts."""
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True)
class Mesh:
    """Tensor, pipeline, data and expert axes."""

    tp: Axis = Axis()
    pp: Axis = Axis()
    dp: Axis = Axis()
    ep: Axis = Axis()

    def layers(self, num_layers: int) -> range:
        """The layers held here: contiguous, the first stages one longer when the count does not divide."""
        base, extra = divmod(num_layers, self.pp.size)
        start = self.pp.rank * base + min(self.pp.rank, extra)
        return range(start, start + base + (1 if self.pp.rank < extra else 0))
