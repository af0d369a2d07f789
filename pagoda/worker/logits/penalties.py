"""Penalties on tokens that have been seen.

    repetition (Keskar et al., 2019, arXiv:1909.05858), prompt and output:  l > 0 ? l / r : l * r
    frequency, output:   l - f * count
    presence, output:    l - p * (count > 0)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.base.types import SamplingParams
from pagoda.worker.logits.step import RowContext

__all__ = ["Penalties"]


class Penalties:
    def wants(self, params: SamplingParams) -> bool:
        return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0

    def apply(self, logits_V: Any, row: RowContext) -> None:
        params = row.params
        if params.repetition_penalty != 1.0:
            seen = np.unique(row.token_ids)
            values = logits_V[seen]
            penalty = np.float32(params.repetition_penalty)
            logits_V[seen] = np.where(values > 0, values / penalty, values * penalty)
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            ids, counts = np.unique(row.output_ids, return_counts=True)
            logits_V[ids] -= np.float32(params.frequency_penalty) * counts.astype(np.float32) + np.float32(params.presence_penalty)
