"""DRY, "don't repeat yourself" (p-e-w, 2024): a token that would make a repetition longer is made less likely.

    n(t)  length of the longest end of the text that has stood in it before, followed by t
    l(t) -= multiplier * base ** (n(t) - allowed_length)      where n(t) >= allowed_length

The text is the last `dry_range` tokens of prompt and output (0: all). A match never reaches over a sequence breaker. Matches
are followed only as far as the penalty grows to `_CERTAIN`: what is that unlikely is never drawn.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pagoda.base.types import SamplingParams
from pagoda.worker.logits.step import RowContext

__all__ = ["Dry", "repeated_lengths"]

_CERTAIN = 1e4  # logits


class Dry:
    def wants(self, params: SamplingParams) -> bool:
        return params.dry_multiplier > 0

    def apply(self, logits_V: Any, row: RowContext) -> None:
        params = row.params
        ids = row.token_ids[-params.dry_range :] if params.dry_range > 0 else row.token_ids
        longest = max(1, params.dry_allowed_length) + _growth(params)
        next_ids, lengths = repeated_lengths(ids, params.dry_breaker_ids or [], longest)
        is_long = lengths >= max(1, params.dry_allowed_length)
        if is_long.any():
            penalty = params.dry_multiplier * params.dry_base ** (lengths[is_long] - params.dry_allowed_length).astype(np.float64)
            logits_V[next_ids[is_long]] -= np.minimum(penalty, _CERTAIN).astype(np.float32)


def _growth(params: SamplingParams) -> int:
    """Tokens beyond the allowed length after which a longer match changes nothing."""
    if params.dry_base <= 1.0 or params.dry_multiplier >= _CERTAIN:
        return 0
    return math.ceil((math.log(_CERTAIN) - math.log(params.dry_multiplier)) / math.log(params.dry_base))


def repeated_lengths(ids: np.ndarray, breaker_ids: list[int], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """-> tokens that would go on with a repetition (each once), and the length of the longest one each would go on with.

    Lengths end at `longest` and at the last token of `breaker_ids`.
    """
    last = len(ids) - 1
    breaks = np.flatnonzero(np.isin(ids, breaker_ids)) if breaker_ids else np.empty(0, np.int64)
    longest = min(longest, last - (int(breaks[-1]) if len(breaks) else -1))
    if last < 1 or longest < 1:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ends = np.flatnonzero(ids[:last] == ids[last])
    live, lengths = np.arange(len(ends)), np.ones(len(ends), np.int64)
    for length in range(1, longest):
        live = live[ends[live] >= length]
        live = live[ids[ends[live] - length] == ids[last - length]]
        if len(live) == 0:
            break
        lengths[live] += 1
    next_ids, where = np.unique(ids[ends + 1], return_inverse=True)
    best = np.zeros(len(next_ids), np.int64)
    np.maximum.at(best, where, lengths)
    return next_ids.astype(np.int64), best
