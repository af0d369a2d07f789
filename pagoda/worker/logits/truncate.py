"""min_p, top_k and top_p as a step of its own, for rows where something comes between them and the draw.

The arithmetic is that of the fused `ops.sample`, whose docstring defines it: the same tokens stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.base.types import SamplingParams
from pagoda.worker.logits.step import RowContext

__all__ = ["Truncate", "truncate"]


def truncate(logits_V: np.ndarray, params: SamplingParams) -> None:
    """In place: what min_p, top_k and top_p leave out becomes -inf."""
    x = logits_V.astype(np.float64)
    p = np.exp((x - x.max()) / params.temperature)
    order = np.argsort(-x, kind="stable")  # logits descending, ids ascending
    kept = order[(p[order] >= params.min_p) & (p[order] > 0)]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    if params.top_p < 1:
        mass = np.cumsum(p[kept])
        kept = kept[: int(np.searchsorted(mass, params.top_p * mass[-1], side="left")) + 1]
    is_out = np.ones(len(logits_V), np.bool_)
    is_out[kept] = False
    np.putmask(logits_V, is_out, -np.inf)


class Truncate:
    """Only for rows with XTC, which must see what the truncations left."""

    def wants(self, params: SamplingParams) -> bool:
        return params.xtc_probability > 0 and params.temperature > 0

    def apply(self, logits_V: Any, row: RowContext) -> None:
        truncate(logits_V, row.params)
