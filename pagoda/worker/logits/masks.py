"""Steps that forbid tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.base.types import SamplingParams
from pagoda.worker.logits.step import RowContext

__all__ = ["AllowedTokens", "BadWords", "MinTokens"]


class AllowedTokens:
    def wants(self, params: SamplingParams) -> bool:
        return params.allowed_token_ids is not None

    def apply(self, logits_V: Any, row: RowContext) -> None:
        ids = np.asarray(row.params.allowed_token_ids)
        kept = logits_V[ids]
        logits_V[:] = -np.inf
        logits_V[ids] = kept


class BadWords:
    """Bans the last token of a sequence whose earlier tokens have just been produced."""

    def wants(self, params: SamplingParams) -> bool:
        return bool(params.bad_words_token_ids)

    def apply(self, logits_V: Any, row: RowContext) -> None:
        for word in row.params.bad_words_token_ids or ():
            *head, last = word
            output = row.output_ids
            if not head or (len(output) >= len(head) and output[-len(head) :].tolist() == head):
                logits_V[last] = -np.inf


class MinTokens:
    def wants(self, params: SamplingParams) -> bool:
        return params.min_tokens > 0

    def apply(self, logits_V: Any, row: RowContext) -> None:
        if len(row.output_ids) < row.params.min_tokens and row.stop_ids:
            logits_V[np.asarray(row.stop_ids)] = -np.inf
