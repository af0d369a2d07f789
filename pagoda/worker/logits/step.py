"""The seam: what a step sees of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pagoda.base.types import SamplingParams

__all__ = ["LogitsStep", "RowContext"]


@dataclass(frozen=True)
class RowContext:
    """One request at the moment of sampling. `token_ids` is a view: prompt, then output."""

    params: SamplingParams
    token_ids: np.ndarray
    num_prompt_tokens: int
    stop_ids: list[int]

    @property
    def output_ids(self) -> np.ndarray:
        return self.token_ids[self.num_prompt_tokens :]


class LogitsStep(Protocol):
    """`apply` changes one row of float32 logits in place. Rows are independent: a neighbour can never matter."""

    def wants(self, params: SamplingParams) -> bool: ...

    def apply(self, logits_V: Any, row: RowContext) -> None: ...
