"""OpenAI's `logit_bias`: a number added to a token's logit."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.base.types import SamplingParams
from pagoda.worker.logits.step import RowContext

__all__ = ["LogitBias"]


class LogitBias:
    def wants(self, params: SamplingParams) -> bool:
        return bool(params.logit_bias)

    def apply(self, logits_V: Any, row: RowContext) -> None:
        bias = row.params.logit_bias or {}
        ids = np.fromiter(bias, np.int64, len(bias))
        logits_V[ids] += np.fromiter(bias.values(), np.float32, len(bias))
