"""Random lives: whatever is added, aborted, preempted or failed in whatever order, the brain's promises hold.

After every step queues, slots and blocks agree; each sample ends exactly once; what a sample says does not depend on its
neighbours; and in the end every block is free. The fake executor checks every plan against simulated keys and values.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.base.errors import InvalidRequest
from pagoda.base.types import KvGroup
from pagoda.engine.block_pool import BlockPool
from pagoda.engine.groups import WindowGroup
from tests.engine.harness import FULL, MIXED, WINDOW, Harness

_QUICK = settings(max_examples=300, deadline=None)

_engines = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([FULL, WINDOW, MIXED]),
        "num_blocks": st.integers(12, 60),
        "prefix_caching": st.booleans(),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.sampled_from([3, 8, 17, 64]),
        "max_logits_rows": st.sampled_from([1, 4, 64]),
        "long_prefill_token_threshold": st.sampled_from([0, 0, 5]),
        "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
        "watermark": st.sampled_from([0.0, 0.2]),
        "pipeline_depth": st.sampled_from([1, 1, 2, 3]),
        "overlaps_late": st.booleans(),
    }
)

_requests = st.fixed_dictionaries(
    {
        "family": st.integers(0, 2),  # requests of one family share their prompt's beginning
        "num_prompt": st.integers(1, 45),
        "own_tail": st.integers(0, 3),
        "max_tokens": st.integers(1, 20),
        "n": st.sampled_from([1, 1, 1, 2, 4]),
        "priority": st.integers(0, 2),
        "salt": st.sampled_from(["", "", "s"]),
        "eos": st.booleans(),
        "min_tokens": st.integers(0, 3),
        "prompt_logprobs": st.sampled_from([None, None, None, 0]),
    }
)

_actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), _requests),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("abort"), st.tuples(st.integers(0, 9), st.integers(-1, 2))),
        st.tuples(st.just("launch"), st.none()),
        st.tuples(st.just("fail"), st.sampled_from(["forward", "half way", "sample", "row"])),
        st.tuples(st.just("preempt"), st.integers(0, 3)),
        st.tuples(st.just("reset"), st.none()),
    ),
    min_size=3,
    max_size=40,
)


class _World:
    """Interprets actions; knows which samples were disturbed and may therefore be cut short."""

    def __init__(self, engine: dict[str, Any]) -> None:
        self.h = Harness(**engine)
        self.is_priority = engine["scheduling_policy"] == "priority"
        self.names: list[str] = []

    def add(self, spec: dict[str, Any]) -> None:
        prompt = [(spec["family"] * 7 + i // 3) % 50 for i in range(spec["num_prompt"])] + [40] * spec["own_tail"]
        name = f"r{len(self.names)}"
        try:
            self.h.add(
                name,
                prompt,
                eos=[7, 21] if spec["eos"] else None,
                priority=spec["priority"] if self.is_priority else 0,
                salt=spec["salt"],
                max_tokens=spec["max_tokens"],
                min_tokens=min(spec["min_tokens"], spec["max_tokens"]),
                n=spec["n"],
                prompt_logprobs=spec["prompt_logprobs"],
            )
        except InvalidRequest:
            return
        self.names.append(name)

    def step(self, times: int) -> None:
        for _ in range(times):
            self.h.step()

    def abort(self, which: tuple[int, int]) -> None:
        number, index = which
        self.h.core.abort([f"r{number}" if index < 0 else (f"r{number}", index)])

    def launch(self, _: None) -> None:
        if self.h.core._may_launch():
            self.h.core.launch()

    def fail(self, how: str) -> None:
        executor = self.h.executor
        number = self.h.core._scheduler._num_steps
        if how == "row":
            if self.names:
                executor.row_errors.add(self.names[-1])
        elif how == "sample":
            executor.fail_sample.add(number)
        else:
            executor.fail_forward.add(number)
            executor.fail_after_apply = how == "half way"

    def preempt(self, place: int) -> None:
        running = self.h.core._scheduler.running
        if place < len(running):
            self.h.core._scheduler.preempt(running[place])

    def reset(self, _: None) -> None:
        self.h.core.reset_prefix_cache()


@_QUICK
@given(engine=_engines, actions=_actions)
def test_random_lives(engine: dict[str, Any], actions: list[tuple[str, Any]]) -> None:
    world = _World(engine)
    for name, argument in actions:
        getattr(world, name)(argument)
        world.h.core.check_integrity()
    world.h.run()
    h = world.h
    for request_id, request in h.requests.items():
        for index in range(request.params.n):
            reason = h.reason(request_id, index)
            tokens, alone = h.expected(request_id, index)
            if reason in ("abort", "error"):
                assert h.tokens[request_id, index] == tokens[: len(h.tokens[request_id, index])]
            else:
                assert (h.tokens[request_id, index], reason) == (tokens, alone)
        if request.params.prompt_logprobs is not None and h.reason(request_id) in ("stop", "length"):
            delivered = [out.prompt_logprobs for out in h.outputs[request_id, 0] if out.prompt_logprobs is not None]
            assert [len(entries) for entries in delivered] == [len(request.prompt_token_ids)]
    assert h.executor.max_rows_of_logits <= engine["max_logits_rows"]
    assert all(plan.num_tokens <= engine["max_num_batched_tokens"] for plan in h.executor.plans)
    h.check_whole()


_pool_actions = st.lists(
    st.tuples(st.sampled_from(["take", "touch", "commit", "release", "launch", "settle", "reset"]), st.integers(0, 7)),
    max_size=60,
)


@_QUICK
@given(num_blocks=st.integers(1, 9), keep=st.booleans(), actions=_pool_actions)
def test_random_lives_of_blocks(num_blocks: int, keep: bool, actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(num_blocks, 2, keep_unowned=keep)
    tables: list[list[int]] = []
    steps: list[int] = []
    number = 0
    for action, k in actions:
        if action == "take" and k <= pool.num_free:
            tables.append(pool.take(k))
        elif action == "touch":
            found = pool.find(k % 2, bytes([k]))  # type: ignore[arg-type]
            if found is not None:
                pool.touch([found])
                tables.append([found])
        elif action == "commit" and tables and tables[-1] and pool._hashes[tables[-1][0]] is None:
            pool.commit(k % 2, bytes([k]), tables[-1][0])  # type: ignore[arg-type]
        elif action == "release" and tables:
            pool.release(reversed(tables.pop(k % len(tables))))
        elif action == "launch":
            steps.append(number)
            pool.launch(number)
            number += 1
        elif action == "settle" and steps:
            pool.settle(steps.pop(0))
        elif action == "reset":
            pool.reset()
        pool.check_integrity(tables)
    assert pool.num_free + pool.num_fenced <= num_blocks - 1


@_QUICK
@given(
    window=st.integers(1, 20),
    cached=st.lists(st.booleans(), max_size=14),
)
def test_window_hit_is_the_longest_servable_one(window: int, cached: list[bool]) -> None:
    group = WindowGroup(KvGroup("window", (0,), window), 4, 8)

    def servable(length: int) -> bool:
        return all(cached[max(0, length * 4 - window + 1) // 4 : length])

    want = max(length for length in range(len(cached) + 1) if servable(length))
    assert group.longest_hit(cached.__getitem__, len(cached)) == want
