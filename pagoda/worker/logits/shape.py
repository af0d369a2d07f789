"""Steps that shape the distribution before the usual truncations. They act on what earlier steps and the grammar left.

    top_n_sigma (Tang et al., 2024, arXiv:2411.07641)    keep  l >= max(l) - n * sigma,  sigma over what is left
    dynamic temperature (Kalomaze, 2023)   T' = low + (high - low) * (H / log(count)) ** exponent,  low, high = T -+ range,
                                           H the entropy of softmax(l) in nats; l is scaled by T / T', and T divides it later
    typical_p (Meister et al., 2022, arXiv:2202.00666)   p = softmax(l / T), H its entropy: keep the smallest set, by
                                           ascending |-log p - H| and then id, whose mass reaches typical_p

Only rows that are drawn (temperature > 0) are shaped: they never change which token is the most likely one but for typical_p.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.base.types import SamplingParams
from pagoda.worker.logits.step import RowContext
from pagoda.worker.logits.truncate import head

__all__ = ["DynamicTemperature", "TopNSigma", "TypicalP", "softmax"]

_COLDEST = 0.01  # as low as `temperature` itself may be


def softmax(logits_V: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float64 probabilities; -inf gives 0. At least one logit must be finite."""
    x = logits_V.astype(np.float64)
    p = np.exp((x - x.max()) / temperature)
    return np.asarray(p / p.sum())


class TopNSigma:
    def wants(self, params: SamplingParams) -> bool:
        return params.top_n_sigma > 0 and params.temperature > 0

    def apply(self, logits_V: Any, row: RowContext) -> None:
        left = logits_V[np.isfinite(logits_V)].astype(np.float64)
        np.putmask(logits_V, logits_V < left.max() - row.params.top_n_sigma * left.std(), -np.inf)


class DynamicTemperature:
    def wants(self, params: SamplingParams) -> bool:
        return params.dynatemp_range > 0 and params.temperature > 0

    def apply(self, logits_V: Any, row: RowContext) -> None:
        params = row.params
        p = softmax(logits_V)
        p = p[p > 0]
        count = int(np.isfinite(logits_V).sum())
        if count < 2:
            return
        share = -float((p * np.log(p)).sum()) / np.log(count)
        low, high = max(0.0, params.temperature - params.dynatemp_range), params.temperature + params.dynatemp_range
        wanted = max(_COLDEST, low + (high - low) * share**params.dynatemp_exponent)
        logits_V -= logits_V.max()
        logits_V *= np.float32(params.temperature / wanted)


class TypicalP:
    def wants(self, params: SamplingParams) -> bool:
        return params.typical_p < 1 and params.temperature > 0

    def apply(self, logits_V: Any, row: RowContext) -> None:
        p = softmax(logits_V, row.params.temperature)
        ids = np.flatnonzero(p > 0)
        surprise = -np.log(p[ids])
        kept = head(np.abs(surprise - (p[ids] * surprise).sum()), p[ids], row.params.typical_p)
        is_out = np.ones(len(logits_V), np.bool_)
        is_out[ids[kept]] = False
        np.putmask(logits_V, is_out, -np.inf)
