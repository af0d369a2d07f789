"""The executor for one worker in this process: two function calls."""

from __future__ import annotations

from pagoda.base.plan import Masks, StepPlan, StepResult
from pagoda.executor.parts import AnyRunner

__all__ = ["UniprocExecutor"]


class UniprocExecutor:
    def __init__(self, runner: AnyRunner) -> None:
        self.runner = runner

    def forward(self, plan: StepPlan) -> None:
        try:
            self.runner.forward(plan)
        except BaseException:
            self.runner.abandon()
            raise

    def sample(self, step: int, masks: Masks | None = None) -> StepResult:
        return self.runner.sample(step, masks)

    def call(self, method: str, *args: object) -> object:
        """Rare messages by name; an unknown one is our bug."""
        return getattr(self.runner, method)(*args)

    def check(self) -> None:
        """Nothing to watch: the worker is this process."""

    def stop(self) -> None:
        """Nothing to stop."""
