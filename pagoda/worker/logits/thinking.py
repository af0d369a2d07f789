"""`thinking_token_budget`: behind so many tokens of reasoning the tokens that end it come, one after the other.

A function of the tokens alone, so preemption, prefix hits and `n` need nothing of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.base.types import SamplingParams, Thinking
from pagoda.worker.logits.step import RowContext

__all__ = ["ThinkingBudget", "forced_token"]


class ThinkingBudget:
    def wants(self, params: SamplingParams) -> bool:
        return params.thinking_token_budget is not None and params.thinking is not None

    def apply(self, logits_V: Any, row: RowContext) -> None:
        assert row.params.thinking is not None
        token = forced_token(row.output_ids, row.params.thinking, row.params.thinking_token_budget or 0)
        if token is not None:
            logits_V[:] = -np.inf
            logits_V[token] = 0.0


def forced_token(output_ids: np.ndarray, thinking: Thinking, budget: int) -> int | None:
    """What must come next behind `output_ids`; None while the model may say what it likes."""
    start, end = ([] if thinking.is_open else thinking.start), thinking.end
    if output_ids[: len(start)].tolist() != start:
        return None
    reasoning = output_ids[len(start) :]
    if len(reasoning) < budget or any(reasoning[i : i + len(end)].tolist() == end for i in np.flatnonzero(reasoning == end[0])):
        return None
    begun = min(len(end) - 1, len(reasoning) - budget)  # tokens of the end that may stand there already
    while begun and reasoning[-begun:].tolist() != end[:begun]:
        begun -= 1
    return end[begun]
