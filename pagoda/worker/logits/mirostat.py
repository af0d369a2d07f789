"""Mirostat 2 (Basu et al., 2021, arXiv:2007.14966): truncation that holds the text's surprise near `mirostat_tau` bits.

    mu starts at 2 tau;  p = softmax(l / T);  tokens with -log2 p > mu are left out, but never the most likely one
    after a draw of token t:  mu -= eta * (-log2 q(t) - tau),  q being p renormalized over what was kept

It stands in the place of min_p, top_k and top_p. `mu` is the one thing of sampling that depends on earlier draws; it is kept by
request id, so that it survives preemption, and never shared: a row's tokens still depend on nothing but its own request.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from pagoda.base.types import SamplingParams
from pagoda.worker.logits.shape import softmax
from pagoda.worker.logits.step import RowContext

__all__ = ["Mirostat"]


class Mirostat:
    """`capacity` requests are remembered, those used last: more than can run or wait in preemption at once."""

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._states: OrderedDict[str, tuple[int, float]] = OrderedDict()  # request id -> (tokens known, mu)

    @staticmethod
    def wants(params: SamplingParams) -> bool:
        return params.mirostat_mode == 2 and params.temperature > 0

    def apply(self, logits_V: np.ndarray, row: RowContext, request_id: str) -> None:
        """In place: too surprising tokens become -inf."""
        p = softmax(logits_V, row.params.temperature)
        with np.errstate(divide="ignore"):
            is_out = -np.log2(p) > self._mu(row, request_id)
        is_out[int(np.argmax(p))] = False
        np.putmask(logits_V, is_out, -np.inf)

    def observe(self, logits_V: np.ndarray, row: RowContext, request_id: str, token: int) -> None:
        """After the draw of `token` from the logits that `apply` left."""
        params = row.params
        surprise = -float(np.log2(softmax(logits_V, params.temperature)[token]))
        mu = self._mu(row, request_id) - params.mirostat_eta * (surprise - params.mirostat_tau)
        self._states[request_id] = (len(row.token_ids) + 1, mu)
        self._states.move_to_end(request_id)
        if len(self._states) > self._capacity:
            self._states.popitem(last=False)

    def _mu(self, row: RowContext, request_id: str) -> float:
        """A request that has no output yet, or is at another place than the one remembered, is a new one."""
        known, mu = self._states.get(request_id, (-1, 0.0))
        is_known = known == len(row.token_ids) > row.num_prompt_tokens
        return mu if is_known else 2 * row.params.mirostat_tau
