"""XTC, "exclude top choices" (p-e-w, 2024): sometimes the most likely tokens are taken away, so that the text is less expected.

With probability `xtc_probability` all tokens with p >= xtc_threshold but the least likely of them become -inf, where p is
softmax(l / T) over what the truncations left. Fewer than two such tokens: nothing happens. The random number is that of (seed,
position) in a stream of its own: the draw that follows does not depend on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.base.types import SamplingParams
from pagoda.kernels.reference.sample import philox_uniform
from pagoda.worker.logits.shape import softmax
from pagoda.worker.logits.step import RowContext

__all__ = ["Xtc", "xtc_uniform"]

_STREAM = 1 << 63  # no position is so large


def xtc_uniform(seed: int, position: int) -> float:
    """The random number that decides whether XTC acts at this position."""
    return philox_uniform(seed, position | _STREAM)


class Xtc:
    def wants(self, params: SamplingParams) -> bool:
        return params.xtc_probability > 0 and params.xtc_threshold <= 0.5 and params.temperature > 0

    def apply(self, logits_V: Any, row: RowContext) -> None:
        params = row.params
        assert params.seed is not None, "the brain gives every request a seed"
        if xtc_uniform(params.seed, len(row.token_ids)) >= params.xtc_probability:
            return
        p = softmax(logits_V, params.temperature)
        top = np.flatnonzero((p >= params.xtc_threshold) & (p > 0))
        if len(top) > 1:
            order = np.argsort(-p[top], kind="stable")  # ids ascending on ties: the highest of them stays
            logits_V[top[order[:-1]]] = -np.inf
