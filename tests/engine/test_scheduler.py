"""Who runs, how much of it, and who has to make room."""

from __future__ import annotations

import msgspec
import pytest

from pagoda.base.types import KvGroup
from tests.engine.harness import BLOCK, FULL, MIXED, WINDOW, Harness


def test_running_before_waiting_within_the_budget() -> None:
    h = Harness(max_num_batched_tokens=16)
    h.add("a", [1] * 10, max_tokens=9)
    h.step()
    h.add("b", [2] * 30)
    h.step()
    assert h.tokens_of_plan() == [(0, 10, 1), (1, 0, 15)]
    h.run()
    h.check_all()


def test_slots_limit_who_runs_and_the_lowest_free_one_is_reused() -> None:
    h = Harness(max_num_seqs=2)
    h.add("a", [1] * 5, max_tokens=2)
    h.add("b", [2] * 5, max_tokens=9)
    h.add("c", [3] * 5, max_tokens=2)
    h.step()
    assert h.core.stats().num_requests_running == 2 and h.core.stats().num_requests_waiting == 1
    h.step()
    h.step()
    plan = h.executor.plans[-1]
    assert plan.released_slots == [0] and [new.slot for new in plan.new] == [0]
    h.run()
    h.check_all()


def test_long_prefill_threshold_only_while_others_could_use_the_step() -> None:
    h = Harness(max_num_batched_tokens=32, long_prefill_token_threshold=8)
    h.add("a", [1] * 40)
    h.step()
    assert h.tokens_of_plan() == [(0, 0, 32)], "alone it takes the whole budget"
    h = Harness(max_num_batched_tokens=32, long_prefill_token_threshold=8)
    h.add("a", [1] * 40)
    h.add("b", [2] * 6)
    h.step()
    assert h.tokens_of_plan() == [(0, 0, 8), (1, 0, 6)]
    h.run()
    h.check_all()


def test_without_chunks_a_prompt_runs_whole_or_not_at_all() -> None:
    h = Harness(max_num_batched_tokens=20, enable_chunked_prefill=False, long_prefill_token_threshold=4)
    h.add("a", [1] * 12)
    h.add("b", [2] * 12)
    h.add("c", [3] * 3)
    h.step()
    assert h.tokens_of_plan() == [(0, 0, 12)], "`b` does not fit the rest, and `c` does not overtake it"
    h.run()
    h.check_all()
    starts = [row for plan in h.executor.plans for row in plan.scheduled if row.num_computed == 0]
    assert sorted(row.num_planned for row in starts) == [3, 12, 12]


def test_logits_rows_limit_sampled_requests() -> None:
    h = Harness(max_logits_rows=2)
    for i in range(5):
        h.add(f"r{i}", [i] * 6)
    h.run()
    assert h.executor.max_rows_of_logits == 2
    h.check_all()


def test_admission_reserves_the_whole_prompt() -> None:
    h = Harness(num_blocks=21, max_num_batched_tokens=8)
    h.add("a", [1] * 40, max_tokens=2)
    h.add("b", [2] * 50, max_tokens=2)
    h.step()
    assert len(h.executor.plans[0].new[0].block_ids[0]) == 40 // BLOCK, "blocks of all of it with the first chunk"
    while ("a", 0) not in h.finished:
        assert h.core.stats().num_requests_running == 1, "`b` is not let in while it could not be finished"
        h.step()
    h.run()
    h.check_all()
    assert h.core.stats().num_preemptions == 0


def test_watermark_is_kept_free_unless_nothing_runs() -> None:
    h = Harness(num_blocks=21, watermark=0.5)
    h.add("a", [1] * 60, max_tokens=3)
    h.add("b", [2] * 6, max_tokens=3)
    h.step()
    assert [new.request_id for new in h.executor.plans[0].new] == ["a"]
    h.run()
    h.check_all()
    h = Harness(num_blocks=21, watermark=0.0)
    h.add("a", [1] * 60, max_tokens=3)
    h.add("b", [2] * 6, max_tokens=3)
    h.step()
    assert [new.request_id for new in h.executor.plans[0].new] == ["a", "b"]


# ---- preemption


def test_preemption_takes_the_latest_and_resumes_it_with_its_tokens() -> None:
    h = Harness(num_blocks=13, prefix_caching=False)
    h.add("a", [1] * 20, max_tokens=20)
    h.add("b", [2] * 20, max_tokens=20)
    h.run()
    h.check_all()
    stats = h.core.stats()
    assert stats.num_preemptions > 0 and stats.generation_tokens == 40, "no token is generated twice"
    lives = [new for plan in h.executor.plans for new in plan.new]
    assert [new.request_id for new in lives][:2] == ["a", "b"] and all(new.request_id == "b" for new in lives[2:])
    resumed = lives[2]
    assert resumed.num_prompt_tokens == 20 < len(resumed.token_ids)
    assert h.finished["b", 0].metrics is not None and h.finished["b", 0].metrics.num_preemptions == stats.num_preemptions


def test_no_admission_in_a_step_that_preempted() -> None:
    h = Harness(num_blocks=13, max_num_seqs=2, scheduling_policy="priority", prefix_caching=False)
    h.add("first", [1] * 20, max_tokens=20, priority=0)
    h.add("last", [2] * 20, max_tokens=20, priority=9)
    h.step()
    h.add("small", [5, 6], max_tokens=1, priority=5)  # waits for a slot
    while h.core.stats().num_preemptions == 0:
        h.step()
    assert h.executor.plans[-1].new == [], "a slot and blocks came free, and still nobody is let in"
    h.step()
    assert [new.request_id for new in h.executor.plans[-1].new] == ["small"]
    h.run()
    h.check_all()


def test_blocks_behind_the_fence_are_waited_for_instead_of_preempting() -> None:
    h = Harness(num_blocks=9, pipeline_depth=2, prefix_caching=False)
    h.add("a", [1] * 8, max_tokens=8)
    h.core.launch()
    h.add("d", [4] * 22, max_tokens=1)
    h.core.launch()
    h.core.abort(["d"])  # all blocks but two of `a` are behind the fence
    h.step()
    h.step()  # `a` has 9 tokens and needs a third block
    h.run()
    h.check_sample("a")
    assert h.core.stats().num_preemptions == 0


def test_mid_prompt_preemption_starts_the_prompt_logprobs_anew() -> None:
    h = Harness(max_num_batched_tokens=8)
    request = h.add("a", 20, prompt_logprobs=0)
    h.step()
    h.core._scheduler.preempt(h.core._scheduler.running[0])
    h.run()
    delivered = h.outputs["a", 0][0].prompt_logprobs
    assert delivered is not None and len(delivered) == len(request.prompt_token_ids)
    h.check_all()


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    h = Harness(num_blocks=13)
    h.add("a", [1] * 20, max_tokens=20)
    h.add("b", [2] * 20, max_tokens=20)
    h.run()
    stats = h.core.stats()
    assert stats.num_preemptions > 0
    assert h.finished["b", 0].num_cached_tokens == 0 and stats.prefix_cache_queries == 40
    h.check_all()


def test_a_dead_owner_is_not_awaited() -> None:
    h = Harness(pipeline_depth=2)
    h.add("a", 20)
    h.core.launch()
    h.core.abort(["a"])
    h.add("b", 20)
    assert h.core.launch() and h.tokens_of_plan() == [(1, 0, 20)]
    h.run()
    h.check_sample("b")


def test_priority_policy_orders_and_picks_victims() -> None:
    h = Harness(num_blocks=15, max_num_seqs=2, scheduling_policy="priority", prefix_caching=False)
    h.add("low", [1] * 20, max_tokens=20, priority=9)
    h.add("mid", [2] * 20, max_tokens=20, priority=5)
    h.add("high", [3] * 20, max_tokens=20, priority=0)
    h.run()
    h.check_all()
    lives = [new.request_id for plan in h.executor.plans for new in plan.new]
    assert lives[:2] == ["high", "mid"]
    assert lives.count("high") == 1 and h.core.stats().num_preemptions > 0
    assert list(h.finished) == [("high", 0), ("mid", 0), ("low", 0)]


# ---- shared prefixes


def test_second_request_hits_all_but_the_last_token() -> None:
    h = Harness()
    h.add("a", 16)
    h.run()
    h.add("b", 16)
    h.step()
    assert h.tokens_of_plan() == [(0, 12, 4)], "a full hit would leave nothing to sample from"
    h.run()
    h.check_all()
    assert h.finished["b", 0].num_cached_tokens == 12


def test_simultaneous_arrivals_share_a_prefix() -> None:
    h = Harness(max_num_batched_tokens=16)
    h.add("a", 40)
    h.add("b", 40)
    h.add("c", [9] * 6)
    h.step()
    assert h.tokens_of_plan() == [(0, 0, 16)]
    for _ in range(2):
        h.step()
    assert (0, 32, 8) in h.tokens_of_plan(), "`a` goes on"
    assert {row[0] for row in h.tokens_of_plan()} == {0, 1}, "`c` is not held up by `b`, which waits"
    h.step()
    assert (2, 36, 4) in h.tokens_of_plan(), "`b` computes its last block only"
    h.run()
    h.check_all()
    assert h.finished["b", 0].num_cached_tokens == 36


def test_a_block_computed_half_by_an_earlier_chunk_is_still_awaited() -> None:
    h = Harness(max_num_batched_tokens=16, long_prefill_token_threshold=6)
    h.add("a", 24)
    h.add("b", 24)
    for begin in (0, 6, 12):
        h.step()
        assert h.tokens_of_plan() == [(0, begin, 6)]
    h.run()
    h.check_all()
    assert h.finished["b", 0].num_cached_tokens == 20


@pytest.mark.parametrize("how", ["abort", "error"])
def test_awaiting_request_is_released_when_the_owner_ends(how: str) -> None:
    h = Harness(max_num_batched_tokens=8)
    h.add("a", 40)
    h.add("b", 40)
    h.step()
    h.step()
    if how == "abort":
        h.core.abort(["a"])
    else:
        h.executor.row_errors.add("a")
    h.run()
    h.check_sample("b")
    assert h.finished["b", 0].num_cached_tokens >= 8, "what was verified is used"
    h.check_whole()


def test_salt_separates_caches() -> None:
    h = Harness()
    h.add("a", 16, salt="x")
    h.run()
    for name, salt, cached in (("same", "x", 12), ("other", "y", 0), ("none", "", 0)):
        h.add(name, 16, salt=salt)
        h.run()
        assert h.finished[name, 0].num_cached_tokens == cached
    h.check_all()


def test_generated_tokens_enter_the_prefix_index() -> None:
    h = Harness()
    request = h.add("a", 10, max_tokens=10)
    h.run()
    h.add("b", request.prompt_token_ids + h.tokens["a", 0] + [1, 2])
    h.run()
    assert h.finished["b", 0].num_cached_tokens == 16, "19 tokens were computed, 16 of them in full blocks"
    h.check_all()


def test_eviction_takes_the_deepest_block_of_the_oldest_first() -> None:
    h = Harness(num_blocks=11)
    h.add("a", [1] * 24, max_tokens=1)
    h.run()
    h.add("b", [2] * 24, max_tokens=1)
    h.run()
    h.add("again", [1] * 24, max_tokens=1)
    h.run()
    assert h.finished["again", 0].num_cached_tokens == 16, "two blocks of six were evicted, from the tail"
    h.check_all()


def test_reset_prefix_cache_refuses_while_in_use_and_forgets_when_idle() -> None:
    h = Harness()
    h.add("a", 16)
    h.step()
    assert not h.core.reset_prefix_cache()
    h.run()
    assert h.core.reset_prefix_cache()
    h.add("b", 16)
    h.run()
    assert h.finished["b", 0].num_cached_tokens == 0


# ---- windows


def test_window_group_keeps_only_its_window() -> None:
    h = Harness(groups=WINDOW, num_blocks=200, max_num_batched_tokens=8)
    h.add("a", 60, max_tokens=30)
    most = 0
    while h.core.has_work():
        h.step()
        most = max(most, round(h.core.stats().kv_cache_usage_perc * 199))
    assert most == 5, "6 - 1 tokens of window and 8 of a step touch at most five blocks of four"
    h.check_all()
    h.check_whole()


def test_window_group_serves_a_request_longer_than_the_pool() -> None:
    h = Harness(groups=WINDOW, num_blocks=7, max_num_batched_tokens=8)
    h.add("a", 60, max_tokens=30)
    h.run()
    h.check_all()


def test_window_hit_needs_the_last_window_only() -> None:
    h = Harness(groups=WINDOW, num_blocks=200)
    h.add("a", 40, max_tokens=1)
    h.run()
    h.add("b", 40, max_tokens=1)
    h.step()
    assert h.tokens_of_plan() == [(0, 36, 4)]
    assert [bool(block) for block in h.executor.plans[-1].new[0].block_ids[0]] == [False] * 7 + [True] * 3
    h.run()
    h.check_all()


def test_hit_is_the_longest_every_group_can_serve() -> None:
    groups = (KvGroup("full", (0,)), KvGroup("window", (1,), 9))
    h = Harness(groups=groups, num_blocks=40)
    h.add("a", 40, max_tokens=1)
    h.run()
    pool = h.core._kv.pool
    victims = [block for block in pool._lru if pool._groups[block] == 1][1]  # the window's last but one
    del pool._lru[victims]
    pool._forget(victims)
    pool._free.append(victims)
    h.add("b", 40, max_tokens=1)
    h.step()
    # block 8 of the window group is gone: after 36 tokens it would be needed, after 32 tokens blocks 6 and 7 are
    assert h.tokens_of_plan() == [(0, 32, 8)]
    h.check_all()


@pytest.mark.parametrize("groups", [FULL, MIXED, WINDOW])
def test_same_arrivals_give_the_same_plans_byte_for_byte(groups: tuple[KvGroup, ...]) -> None:
    def replay() -> bytes:
        h = Harness(groups=groups, num_blocks=40, max_num_batched_tokens=20, long_prefill_token_threshold=9)
        for i in range(30):
            h.add(f"r{i}", [i % 3] * (3 + 5 * i % 37), n=1 + i % 3, max_tokens=1 + i % 11, seed=i if i % 2 else None)
            if i % 5 == 4:
                h.core.abort([f"r{i - 2}"])
            h.step()
        h.run()
        return msgspec.msgpack.encode(h.executor.plans)

    assert replay() == replay()


def test_a_newcomer_gets_a_share_of_how_many_requests_decode() -> None:
    h = Harness(max_num_batched_tokens=256, num_blocks=200, max_num_seqs=40)
    for i in range(20):
        h.add(f"d{i}", [i + 1] * 4, max_tokens=30)
    h.step()
    h.step()
    h.add("newcomer", [9] * 90, max_tokens=2)
    h.step()
    assert h.executor.plans[-1].scheduled[-1].num_planned == 48
    h.run()
    h.check_all()


def test_prompts_are_not_paced_while_nobody_decodes_or_with_target_zero() -> None:
    h = Harness(max_num_batched_tokens=64)
    h.add("a", [1] * 60)
    h.step()
    assert h.tokens_of_plan() == [(0, 0, 60)]
    h = Harness(max_num_batched_tokens=64, itl_target_ms=0)
    h.add("a", [1] * 4, max_tokens=20)
    h.step()
    h.add("b", [2] * 60)
    h.step()
    assert h.tokens_of_plan()[-1] == (1, 0, 60)
    h.run()
    h.check_all()


def test_a_burst_fills_the_step() -> None:
    h = Harness(max_num_batched_tokens=400, num_blocks=300, max_num_seqs=40)
    for i in range(4):
        h.add(f"d{i}", [i + 1] * 4, max_tokens=30)
    h.step()
    for i in range(10):
        h.add(f"b{i}", [10 + i] * 30, max_tokens=2)
    h.step()
    planned = sum(row.num_planned for row in h.executor.plans[-1].scheduled)
    assert planned == 4 + 16 * 10, "four decode, ten prompts wait"
    h.run()
    h.check_all()


def test_the_further_into_its_context_a_prompt_is_the_fewer_tokens_it_gets() -> None:
    from pagoda.engine.limits import PromptPace, Step

    pace, step = PromptPace(None, even_position=1000), Step(0, 21)
    step.num_decoding = 20

    class Req:
        num_tokens_computed = 0

    req = Req()
    shares = []
    for req.num_tokens_computed in (0, 1000, 9000):
        shares.append(pace.cap(req, 500, step))  # type: ignore[arg-type]
    assert shares == [48, 24, PromptPace.MIN_TOKENS]


def test_pace_learns_from_step_times_when_there_is_a_target() -> None:
    from pagoda.engine.limits import PromptPace, Step

    pace = PromptPace(0.050)

    def step(num_decoding: int, num_prompt_tokens: int) -> Step:
        made = Step(0, 5)
        made.num_decoding, made.num_prompt_tokens = num_decoding, num_prompt_tokens
        return made

    class Req:
        pass

    assert pace.cap(Req(), 500, step(4, 0)) == PromptPace.MIN_TOKENS, "nothing is known yet"  # type: ignore[arg-type]
    pace.observe(step(4, 0), 0.010)
    pace.observe(step(4, 20), 0.020)
    assert pace.cap(Req(), 500, step(4, 0)) == 80, "40 ms are left, half a millisecond each"  # type: ignore[arg-type]
    assert pace.cap(Req(), 500, step(4, 70)) == 10, "other prompts had their share"  # type: ignore[arg-type]
