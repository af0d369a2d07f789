"""Which steps the rows of one request go through; worked out once, when it is admitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagoda.base.types import SamplingParams
from pagoda.worker.logits.bias import LogitBias
from pagoda.worker.logits.dry import Dry
from pagoda.worker.logits.masks import AllowedTokens, BadWords, MinTokens
from pagoda.worker.logits.mirostat import Mirostat
from pagoda.worker.logits.penalties import Penalties
from pagoda.worker.logits.shape import DynamicTemperature, TopNSigma, TypicalP
from pagoda.worker.logits.step import LogitsStep
from pagoda.worker.logits.thinking import ThinkingBudget
from pagoda.worker.logits.truncate import Truncate
from pagoda.worker.logits.xtc import Xtc

__all__ = ["SHAPERS", "STEPS", "Chain", "chain_of"]

STEPS: tuple[LogitsStep, ...] = (AllowedTokens(), BadWords(), MinTokens(), LogitBias(), Penalties(), Dry())
_LAST: tuple[LogitsStep, ...] = (ThinkingBudget(),)  # where it has its say nothing else counts
"""Before the grammar's mask."""

SHAPERS: tuple[LogitsStep, ...] = (TopNSigma(), DynamicTemperature(), TypicalP(), Truncate(), Xtc())
"""After it: they choose among what is allowed."""


@dataclass(frozen=True)
class Chain:
    steps: tuple[LogitsStep, ...]
    shapers: tuple[LogitsStep, ...]
    has_mirostat: bool

    def __bool__(self) -> bool:
        """Whether anything changes the logits before the fused draw."""
        return bool(self.steps or self.shapers or self.has_mirostat)

    @property
    def is_truncated(self) -> bool:
        """min_p, top_k and top_p are done, or replaced: the draw must not do them again."""
        return self.has_mirostat or any(isinstance(step, Truncate) for step in self.shapers)


def chain_of(params: SamplingParams, processors: Sequence[LogitsStep] = ()) -> Chain:
    """`processors` are plug-ins: they come after our own steps but the thinking budget, before the grammar's mask."""
    has_mirostat = Mirostat.wants(params)
    shapers = tuple(step for step in SHAPERS if step.wants(params) and not (has_mirostat and isinstance(step, Truncate | Xtc)))
    return Chain(tuple(step for step in (*STEPS, *processors, *_LAST) if step.wants(params)), shapers, has_mirostat)
