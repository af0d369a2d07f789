"""What building a runner gives, on any device: the seam between `launch` and its two ways of computing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pagoda.base.plan import Masks, StepPlan, StepResult
from pagoda.base.resolve import KvBudget, Reason
from pagoda.loader.place import Place
from pagoda.models.decoder import Model

__all__ = ["AnyRunner", "BuildModel", "RunnerParts"]

BuildModel = Callable[[Place], Model]
"""Reads the weights into a place."""


class AnyRunner(Protocol):
    @property
    def mode(self) -> tuple[str, str]:
        """How forwards run, and why."""

    @property
    def max_rows(self) -> int:
        """Rows of logits a step may have."""

    @property
    def num_steps(self) -> int:
        """Steps that may be between their halves."""

    @property
    def plans_ahead(self) -> bool:
        """Plain requests may be planned ahead of their tokens."""

    def forward(self, plan: StepPlan) -> None: ...

    def sample(self, step: int, masks: Masks | None = None) -> StepResult: ...

    def abandon(self) -> None: ...


@dataclass(frozen=True)
class RunnerParts:
    """Sizes in bytes. `buffers`: what the loop keeps for good; workspace and graphs are a GPU's."""

    runner: AnyRunner
    model: Model
    budget: KvBudget
    kernels: str
    buffers_nbytes: int
    workspace_nbytes: int = 0
    graphs_nbytes: int = 0
    reasons: tuple[Reason, ...] = ()
