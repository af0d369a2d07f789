"""What building a runner gives, on any device: the seam between `launch` and its two ways of computing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pagoda.base.plan import Masks, StepPlan, StepResult
from pagoda.base.resolve import KvBudget, Reason
from pagoda.base.types import DrawsAhead
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
    def overlaps_late(self) -> bool:
        """A step may be started while one is in flight that has rows to be drawn once its logits are there."""

    @property
    def draws_ahead(self) -> DrawsAhead | None:
        """Whose tokens it draws by itself, so that they can be planned before they are known."""

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
