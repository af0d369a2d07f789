"""Builders that an engine process of the tests is started with: the real core over the toy worker, and ways to go wrong.

`config.model.model` says how: `toy`, or `toy:slow` (20 ms a step), `toy:hang` (the third step never ends), `toy:kill` (as slow, and the third step ends
the process), `toy:bug` (the third step finds a bug of ours), `toy:fail` (the third step raises).
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from typing import Any

from pagoda.base.config import EngineConfig, config_from_kwargs
from pagoda.base.errors import OutOfMemory
from pagoda.base.plan import Masks, StepPlan, StepResult
from pagoda.base.types import KvGroup, ModelFacts
from pagoda.engine.core import EngineCore
from tests.engine.fake_executor import FakeExecutor

MAX_MODEL_LEN = 256


def toy_config(model: str = "toy", **changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "max_model_len": MAX_MODEL_LEN, "block_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 64, "num_threads": 1
    }  # fmt: skip
    return config_from_kwargs(model, **(values | changes))


class MoodyExecutor(FakeExecutor):
    """The toy worker in the mood that the config asks for."""

    def __init__(self, mood: str, *args: Any) -> None:
        super().__init__(*args)
        self.mood, self.vocab_size = mood, 256

    def forward(self, plan: StepPlan) -> None:
        if self.mood in ("slow", "kill"):
            time.sleep(0.02)
        if plan.step == 3 or (self.mood == "fail" and plan.step < 3):
            if self.mood == "hang":
                time.sleep(1000)
            if self.mood == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.mood == "fail":
                raise RuntimeError("the device fell over")
        super().forward(plan)
        del self.plans[:-10]  # nobody looks at them in this process

    def sample(self, step: int, masks: Masks | None = None) -> StepResult:
        result = super().sample(step, masks)
        if self.mood == "bug" and step == 3:
            result.rows[0].slot += 1
        return result


@dataclass
class ToyLedger:
    num_blocks: int
    block_size: int = 16
    num_kv_tokens: int = 1008
    max_concurrency: float = 4.0

    def lines(self) -> list[str]:
        return ["a toy"]


@dataclass
class ToyEngine:
    core: EngineCore
    config: EngineConfig
    facts: ModelFacts
    ledger: ToyLedger

    def close(self) -> None:
        return None


def build(config: EngineConfig) -> ToyEngine:
    mood = str(config.model.model).partition(":")[2]
    if mood == "full":
        raise OutOfMemory("the toy does not fit; lower --max-model-len")
    if mood == "broken":
        raise ZeroDivisionError("a bug in the builder")
    if mood == "late":
        time.sleep(0.5)
    groups = (KvGroup("full", (0, 1)),)
    facts = ModelFacts(
        architecture="toy", vocab_size=258, max_model_len=MAX_MODEL_LEN, num_layers=2, kv_groups=groups, num_kv_planes=2,
        num_kv_heads=1, head_dim=4, dtype="float32",
    )  # fmt: skip
    num_blocks = config.cache.num_gpu_blocks_override or 64
    executor = MoodyExecutor(mood, groups, 16)
    config = replace(config, device=replace(config.device, device="cpu"))
    core = EngineCore(config, facts, num_blocks, executor, max_logits_rows=64)
    return ToyEngine(core, config, facts, ToyLedger(num_blocks))
