"""A core on the fake executor, and helpers that say what a test means."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec

from pagoda.base.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from pagoda.base.types import EngineOutput, GenerateRequest, KvGroup, ModelFacts, SamplingParams
from pagoda.engine.core import EngineCore
from tests.engine.fake_executor import EOS, VOCAB, FakeExecutor, toy_generate

BLOCK = 4
FULL = (KvGroup("full", (0,)),)
WINDOW = (KvGroup("window", (0,), 6),)
MIXED = (KvGroup("full", (0,)), KvGroup("window", (1,), 6), KvGroup("window", (2,), 9))


class Clock:
    """A second per look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Harness:
    """Collects outputs per (request id, index) and checks that each sample ends once."""

    def __init__(
        self,
        *,
        groups: tuple[KvGroup, ...] = FULL,
        num_blocks: int = 200,
        block_size: int = BLOCK,
        max_model_len: int = 100,
        prefix_caching: bool = True,
        max_logits_rows: int = 64,
        pipeline_depth: int = 1,
        overlaps_late: bool = True,
        seed: int = 0,
        **scheduler: Any,
    ) -> None:
        scheduler = {"max_num_seqs": 8, "max_num_batched_tokens": 64, **scheduler}
        config = EngineConfig(
            model=ModelConfig(max_model_len=max_model_len, seed=seed),
            cache=CacheConfig(block_size=block_size, enable_prefix_caching=prefix_caching),
            scheduler=SchedulerConfig(**scheduler),
        )
        facts = ModelFacts(
            architecture="toy", vocab_size=VOCAB, max_model_len=max_model_len, num_layers=len(groups), kv_groups=groups,
            num_kv_planes=1, num_kv_heads=1, head_dim=1, dtype="float32",
        )
        self.executor = FakeExecutor(groups, block_size)
        self.max_model_len = max_model_len
        self.core = EngineCore(
            config, facts, num_blocks, self.executor, max_logits_rows=max_logits_rows, clock=Clock(),
            pipeline_depth=pipeline_depth, overlaps_late=overlaps_late,
        )
        self.requests: dict[str, GenerateRequest] = {}
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.outputs: dict[tuple[str, int], list[EngineOutput]] = defaultdict(list)

    def add(self, request_id: str, prompt: list[int] | int, *, eos: list[int] | None = None, priority: int = 0,
            salt: str = "", **params: Any) -> GenerateRequest:
        """`prompt` as an integer means that many tokens, the same for every request."""
        token_ids = [(3 * i + i // 7) % VOCAB for i in range(prompt)] if isinstance(prompt, int) else prompt
        params = {"max_tokens": 5, "ignore_eos": eos is None, "seed": 1, **params}
        request = GenerateRequest(
            request_id=request_id, prompt_token_ids=token_ids, params=SamplingParams(**params),
            eos_token_ids=eos if eos is not None else [EOS], priority=priority, cache_salt=salt,
        )
        self.core.add(request)
        self.requests[request_id] = request
        return request

    def step(self) -> list[EngineOutput]:
        outputs = self.core.step()
        self.core.check_integrity()
        for output in outputs:
            key = (output.request_id, output.index)
            assert key not in self.finished, f"{key} got an output after its end"
            self.tokens[key] += output.new_token_ids
            self.outputs[key].append(output)
        return outputs

    def run(self, max_steps: int = 3000) -> None:
        """Until idle."""
        for _ in range(max_steps):
            if not self.core.has_work():
                return
            self.step()
        raise AssertionError("the core does not come to an end")

    @property
    def finished(self) -> dict[tuple[str, int], EngineOutput]:
        return {key: outs[-1] for key, outs in self.outputs.items() if outs[-1].finish_reason is not None}

    def reason(self, request_id: str, index: int = 0) -> str:
        reason = self.finished[request_id, index].finish_reason
        assert reason is not None
        return reason.value

    def expected(self, request_id: str, index: int = 0) -> tuple[list[int], str]:
        """What the toy model says alone."""
        request = self.requests[request_id]
        params = msgspec.structs.replace(request.params, n=1, seed=(request.params.seed or 0) + index)
        return toy_generate(request, params, self.max_model_len)

    def check_sample(self, request_id: str, index: int = 0) -> None:
        assert (self.tokens[request_id, index], self.reason(request_id, index)) == self.expected(request_id, index)

    def check_all(self) -> None:
        for request_id, request in self.requests.items():
            for index in range(request.params.n):
                self.check_sample(request_id, index)

    def check_whole(self) -> None:
        """Nothing is owned any more."""
        assert self.core.is_idle and not self.core.has_work()
        self.core.check_integrity()
        assert self.core.stats().kv_cache_usage_perc == 0.0

    def tokens_of_plan(self, step: int = -1) -> list[tuple[int, int, int]]:
        """(slot, num_computed, num_planned) of each row of a plan."""
        return [(row.slot, row.num_computed, row.num_planned) for row in self.executor.plans[step].scheduled]

    def seeds(self) -> dict[str, int | None]:
        """What the worker was told."""
        return {new.request_id: new.params.seed for plan in self.executor.plans for new in plan.new}
