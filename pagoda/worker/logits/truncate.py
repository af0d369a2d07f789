"""min_p, top_k and top_p as a step of its own, for rows where something comes between them and the draw.

The arithmetic is that of the fused `ops.sample`, whose docstring defines it: the same tokens stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.base.types import SamplingParams
from pagoda.worker.logits.step import RowContext

__all__ = ["Truncate", "head", "smallest", "truncate"]

_FIRST_HEAD = 256  # tokens; most heads are shorter


def truncate(logits_V: np.ndarray, params: SamplingParams) -> None:
    """In place: what min_p, top_k and top_p leave out becomes -inf."""
    if params.min_p <= 0 and params.top_k <= 0 and params.top_p >= 1:
        return
    x = logits_V.astype(np.float64)
    p = np.exp((x - x.max()) / params.temperature)
    kept = np.flatnonzero((p >= params.min_p) & (p > 0))
    if 0 < params.top_k < len(kept):
        kept = kept[smallest(-x[kept], params.top_k)]
    if params.top_p < 1:
        kept = kept[head(-x[kept], p[kept], params.top_p)]
    is_out = np.ones(len(logits_V), np.bool_)
    is_out[kept] = False
    np.putmask(logits_V, is_out, -np.inf)


def smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` smallest keys in ascending order, lower indices first on ties; without sorting the rest."""
    near = np.arange(len(keys))
    if count < len(keys):
        near = np.flatnonzero(keys <= np.partition(keys, count - 1)[count - 1])
    return np.asarray(near[np.argsort(keys[near], kind="stable")][:count])


def head(keys: np.ndarray, mass: np.ndarray, share: float) -> np.ndarray:
    """Indices of the shortest head, in ascending order of keys, that has `share` of the mass."""
    target, count = share * float(mass.sum()), _FIRST_HEAD
    while True:
        order = smallest(keys, count)
        sums = np.cumsum(mass[order])
        if sums[-1] >= target or len(order) == len(keys):
            return order[: int(np.searchsorted(sums, target, side="left")) + 1]
        count *= 16


class Truncate:
    """Only for rows with XTC, which must see what the truncations left."""

    def wants(self, params: SamplingParams) -> bool:
        return params.xtc_probability > 0 and params.temperature > 0

    def apply(self, logits_V: Any, row: RowContext) -> None:
        truncate(logits_V, row.params)
