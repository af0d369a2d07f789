"""Requests through the core: stops, aborts, failures, samples, validation."""

from __future__ import annotations

import pytest

from pagoda.base.errors import InvalidRequest, QueueFull
from pagoda.base.types import FinishReason, GenerateRequest, SamplingParams
from pagoda.engine.request import Request
from tests.engine.fake_executor import VOCAB, chain, toy_logprob
from tests.engine.harness import FULL, MIXED, Harness


def test_one_request_matches_the_model_alone() -> None:
    h = Harness()
    h.add("a", 10, max_tokens=7)
    h.run()
    h.check_all()
    assert len(h.tokens["a", 0]) == 7 and h.reason("a") == "length"
    assert h.tokens_of_plan(0) == [(0, 0, 10)] and h.tokens_of_plan(1) == [(0, 10, 1)]
    h.check_whole()


def test_prompt_is_chunked_to_the_budget_and_partial_chunks_emit_nothing() -> None:
    h = Harness(max_num_batched_tokens=16)
    h.add("a", 40)
    assert h.step() == [] and h.step() == []
    assert len(h.step()) == 1
    assert [h.tokens_of_plan(i) for i in range(3)] == [[(0, 0, 16)], [(0, 16, 16)], [(0, 32, 8)]]
    h.run()
    h.check_all()


def test_eos_comes_before_stop_token_before_length() -> None:
    probe = Harness()
    probe.add("a", 10, max_tokens=3)
    probe.run()
    third = probe.tokens["a", 0][2]
    h = Harness()
    h.add("eos", 10, eos=[third], stop_token_ids=[third], max_tokens=3)
    h.add("stop", 10, eos=[], stop_token_ids=[third], max_tokens=3)
    h.add("ignored", 10, eos=None, max_tokens=3)
    h.run()
    assert (h.reason("eos"), h.finished["eos", 0].stop_reason) == ("stop", None)
    assert (h.reason("stop"), h.finished["stop", 0].stop_reason) == ("stop", third)
    assert h.reason("ignored") == "length"
    assert h.tokens["eos", 0][-1] == third, "the stop token itself is part of the tokens"


def test_min_tokens_holds_stops_back() -> None:
    h = Harness()
    every = list(range(0, VOCAB, 2))
    h.add("a", 10, eos=every, min_tokens=6, max_tokens=30)
    h.run()
    h.check_all()
    assert len(h.tokens["a", 0]) > 6 and not set(h.tokens["a", 0][:6]) & set(every)


def test_stops_count_only_once_min_tokens_is_reached() -> None:
    def request(min_tokens: int) -> Request:
        params = SamplingParams(min_tokens=min_tokens, max_tokens=9, stop_token_ids=[4])
        return Request(request_id="a", index=0, sequence=0, prompt_token_ids=[1], params=params, eos_token_ids=[3], max_tokens_total=4)

    req = request(2)
    stops = []
    for token in (3, 4):
        req.token_ids.append(token)
        stops.append(req.check_stop(token))
    assert stops == [None, (FinishReason.STOP, 4)]
    req = request(9)
    req.token_ids += [3, 3, 3]
    assert req.check_stop(3) == (FinishReason.LENGTH, None)


def test_only_the_first_sample_brings_prompt_logprobs() -> None:
    h = Harness()
    h.add("a", 18, n=2, prompt_logprobs=0)
    h.run()
    assert h.outputs["a", 0][0].prompt_logprobs is not None
    assert all(out.prompt_logprobs is None for out in h.outputs["a", 1])
    assert h.tokens_of_plan(1) == [(0, 18, 1), (1, 16, 2)], "the second shares what the first computed"


def test_max_model_len_ends_a_request_without_max_tokens() -> None:
    h = Harness(max_model_len=30)
    h.add("a", 10, max_tokens=None)
    h.run()
    assert len(h.tokens["a", 0]) == 20 and h.reason("a") == "length"


def test_logprobs_come_with_their_tokens() -> None:
    h = Harness()
    request = h.add("a", 10, logprobs=0)
    h.run()
    hashes = chain(request.prompt_token_ids + h.tokens["a", 0])
    got = [entry for out in h.outputs["a", 0] for entry in out.logprobs or ()]
    assert got == [toy_logprob(hashes[9 + i], token) for i, token in enumerate(h.tokens["a", 0])]


@pytest.mark.parametrize("num_rows", [3, 8, 64])
def test_prompt_logprobs_cover_the_prompt_bypass_hits_and_respect_the_rows(num_rows: int) -> None:
    h = Harness(max_logits_rows=num_rows)
    h.add("warm", 21)
    h.run()
    request = h.add("a", 21, prompt_logprobs=0)
    h.add("other", [1, 2, 3])
    h.run()
    first, *rest = h.outputs["a", 0]
    hashes = chain(request.prompt_token_ids)
    want = [None, *(toy_logprob(hashes[i], request.prompt_token_ids[i + 1]) for i in range(20))]
    assert first.prompt_logprobs == want and first.num_cached_tokens == 0
    assert all(out.prompt_logprobs is None for out in rest)
    assert h.executor.max_rows_of_logits <= num_rows
    h.check_all()


def test_prompt_logprobs_survive_preemption_once() -> None:
    h = Harness(num_blocks=14, max_num_batched_tokens=8, prefix_caching=True)
    h.add("old", [1] * 5, max_tokens=30)
    request = h.add("a", 20, prompt_logprobs=0, max_tokens=20)
    h.run()
    assert h.core.stats().num_preemptions > 0
    delivered = [out.prompt_logprobs for out in h.outputs["a", 0] if out.prompt_logprobs is not None]
    assert len(delivered) == 1 and len(delivered[0]) == len(request.prompt_token_ids)
    h.check_all()


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_samples_share_the_full_blocks_of_the_prompt(prefix_caching: bool) -> None:
    h = Harness(prefix_caching=prefix_caching, groups=FULL)
    h.add("a", 18, n=3, max_tokens=4)
    h.step()
    assert h.tokens_of_plan() == [(0, 0, 18)], "the others wait for the first"
    h.step()
    assert h.tokens_of_plan() == [(0, 18, 1), (1, 16, 2), (2, 16, 2)]
    tables = [new.block_ids[0] for plan in h.executor.plans for new in plan.new]
    assert tables[0][:4] == tables[1][:4] == tables[2][:4]
    assert len({table[4] for table in tables}) == 3, "the partial block is each one's own"
    h.run()
    h.check_all()
    assert len({tuple(h.tokens["a", i]) for i in range(3)}) == 3
    h.check_whole()
    h.add("b", 18, max_tokens=4)
    h.run()
    assert h.finished["b", 0].num_cached_tokens == (16 if prefix_caching else 0), "private blocks are not kept"


def test_samples_of_different_requests_do_not_share_without_prefix_caching() -> None:
    h = Harness(prefix_caching=False)
    h.add("a", 18, n=2)
    h.add("b", 18, n=2)
    h.step()
    assert h.tokens_of_plan() == [(0, 0, 18), (1, 0, 18)]
    h.run()
    h.check_all()


def test_sample_seeds_follow_the_request_seed() -> None:
    h = Harness()
    h.add("a", 5, n=3, seed=40)
    h.add("free", 5, seed=None)
    h.add("free2", 5, seed=None)
    h.run()
    seeds = h.seeds()
    assert [seeds["a"], seeds["a#1"], seeds["a#2"]] == [40, 41, 42]
    assert None not in (seeds["free"], seeds["free2"]) and seeds["free"] != seeds["free2"]
    again, other = Harness(), Harness(seed=5)
    for core in (again, other):
        core.add("a", 5, n=3, seed=40)
        core.add("free", 5, seed=None)
        core.run()
    assert again.seeds()["free"] == seeds["free"] != other.seeds()["free"]


# ---- aborts


def test_abort_while_waiting_running_and_between_launch_and_settle() -> None:
    h = Harness(max_num_seqs=2)
    for name in ("a", "b", "c"):
        h.add(name, 10, max_tokens=50)
    h.step()
    h.step()
    h.core.abort(["c"])  # waiting for a slot
    h.core.abort(["a"])  # running
    h.core.launch()
    h.core.abort(["b"])  # in flight
    h.core.check_integrity()
    h.run()
    assert [h.reason(name) for name in ("a", "b", "c")] == ["abort"] * 3
    assert all(sum(o.finish_reason is not None for o in h.outputs[n, 0]) == 1 for n in ("a", "b", "c"))
    h.check_whole()


def test_abort_is_idempotent_and_ignores_unknown_ids() -> None:
    h = Harness()
    h.add("a", 10)
    h.core.abort(["a", "a", "nobody"])
    h.core.abort(["a"])
    h.run()
    assert len(h.outputs["a", 0]) == 1
    h.check_whole()


def test_abort_of_one_sample_leaves_the_others() -> None:
    h = Harness()
    h.add("a", 10, n=3, max_tokens=6)
    h.step()
    h.step()
    h.core.abort([("a", 1)], FinishReason.STOP)
    h.run()
    assert h.reason("a", 1) == "stop"
    h.check_sample("a", 0)
    h.check_sample("a", 2)
    assert h.core.stats().request_success == {"stop": 1, "length": 2}


def test_abort_of_the_leader_lets_the_others_compute() -> None:
    h = Harness(max_num_batched_tokens=8)
    h.add("a", 30, n=2, max_tokens=4)
    h.step()
    h.core.abort([("a", 0)])
    h.run()
    h.check_sample("a", 1)
    h.check_whole()


def test_blocks_and_slot_given_back_in_flight_are_not_reused_before_the_step_settles() -> None:
    h = Harness(num_blocks=11, max_model_len=40, prefix_caching=False, pipeline_depth=2)
    h.add("a", 20, max_tokens=10)
    h.core.launch()
    h.core.abort(["a"])
    h.add("b", [9] * 25, max_tokens=10)
    assert not h.core.launch(), "half of the pool is behind the fence"
    h.core.settle()
    assert h.core.launch()
    assert h.executor.plans[-1].released_slots == [0] and h.executor.plans[-1].new[0].slot == 0
    h.run()
    h.check_sample("b")
    h.check_whole()


# ---- failures


def test_row_error_fails_one_request_alone() -> None:
    h = Harness()
    for name in ("a", "b", "c"):
        h.add(name, [ord(name) % VOCAB] * 9, max_tokens=6)
    h.step()
    h.executor.row_errors.add("b")
    h.run()
    assert h.reason("b") == "error" and "non-finite" in (h.finished["b", 0].error or "")
    h.check_sample("a")
    h.check_sample("c")
    h.check_whole()


@pytest.mark.parametrize("half", ["forward", "forward half way", "sample"])
@pytest.mark.parametrize("depth", [1, 2])
def test_executor_failure_ends_the_requests_of_the_step_and_nothing_else(half: str, depth: int) -> None:
    h = Harness(max_num_seqs=2, pipeline_depth=depth)
    for i in range(4):
        h.add(f"r{i}", [i] * 9, max_tokens=6)
    h.step()
    failing = {len(h.executor.plans)}
    if half == "sample":
        h.executor.fail_sample = failing
    else:
        h.executor.fail_forward, h.executor.fail_after_apply = failing, half != "forward"
    h.run()
    reasons = [h.reason(f"r{i}") for i in range(4)]
    assert "error" in reasons and "length" in reasons
    assert isinstance(h.core.failure, RuntimeError)
    for i, reason in enumerate(reasons):
        if reason == "length":
            h.check_sample(f"r{i}")
    h.check_whole()


def test_slots_released_in_a_plan_that_was_not_heard_are_released_again() -> None:
    h = Harness()
    h.add("a", [1] * 5, max_tokens=1)
    h.add("b", [2] * 5, max_tokens=5)
    h.step()
    h.executor.fail_forward = {1}  # the plan that releases the slot of `a`
    h.step()
    h.add("c", [3] * 5)
    h.run()
    h.check_sample("c")
    assert h.executor.plans[-1].scheduled[0].slot == 0 and h.reason("b") == "error"


def test_slots_are_released_even_if_the_next_plan_is_empty() -> None:
    h = Harness(pipeline_depth=2)
    for name in ("a", "b", "c"):
        h.add(name, [ord(name) % VOCAB] * 5, max_tokens=1)
        h.core.launch()
        if name == "b":
            h.core.settle()
    h.core.settle()
    assert not h.core.launch(), "only `c` is left, and it is in flight"
    h.core.settle()
    h.add("d", [4] * 5)
    h.run()
    h.check_sample("d")


def test_interrupt_during_a_step_ends_its_requests_and_passes_on() -> None:
    h = Harness()
    h.add("a", 10)

    def interrupt(step: int, masks: object = None) -> None:
        raise KeyboardInterrupt

    h.executor.sample = interrupt  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        h.core.step()
    assert [out.finish_reason for out in h.step()] == [FinishReason.ERROR]
    h.check_whole()


# ---- validation


@pytest.mark.parametrize(
    ("prompt", "changes", "params", "param", "words"),
    [
        ([], {}, {}, "prompt", ["empty"]),
        ([1] * 100, {}, {}, "prompt", ["100", "99"]),
        ([1, VOCAB], {}, {}, "prompt", [str(VOCAB)]),
        ([1, -2], {}, {}, "prompt", ["-2"]),
        ([1], {"priority": 3}, {}, "priority", ["3", "fcfs"]),
        ([1] * 50, {}, {"max_tokens": 40}, "max_tokens", ["23", "20"]),
    ],
)
def test_what_cannot_work_is_refused_with_numbers(prompt, changes, params, param, words) -> None:  # type: ignore[no-untyped-def]
    h = Harness(num_blocks=21)
    request = GenerateRequest(request_id="a", prompt_token_ids=prompt, params=SamplingParams(**params), **changes)
    with pytest.raises(InvalidRequest) as caught:
        h.core.add(request)
    assert caught.value.param == param and all(word in caught.value.message for word in words)
    h.core.submit(request)
    (output,) = h.step()
    assert (output.finish_reason, output.error_type, output.error_param) == (FinishReason.ERROR, "InvalidRequest", param)
    h.check_whole()


def test_duplicate_id_is_refused_and_the_first_goes_on() -> None:
    h = Harness()
    request = h.add("a", 10)
    with pytest.raises(InvalidRequest, match="already in use"):
        h.core.add(request)
    h.run()
    h.check_all()


def test_prompt_that_never_fits_a_step_is_refused_without_chunks() -> None:
    h = Harness(enable_chunked_prefill=False, max_num_batched_tokens=30, max_logits_rows=10)
    with pytest.raises(InvalidRequest, match="30 tokens"):
        h.add("a", 31)
    with pytest.raises(InvalidRequest, match="10 tokens"):
        h.add("a", 11, prompt_logprobs=0)


def test_queue_limit_counts_those_that_cannot_run_at_once() -> None:
    h = Harness(max_num_seqs=1, max_num_queued_reqs=1)
    h.add("runs", 5)
    h.add("waits", 5)
    with pytest.raises(QueueFull, match="max-num-queued-reqs is 1"):
        h.add("refused", 5)
    h.run()
    h.check_all()
    assert h.core.stats().admission_rejections == {"QueueFull": 1}


def test_stats_add_up() -> None:
    h = Harness(groups=MIXED)
    for name in ("a", "b"):
        h.add(name, 17, max_tokens=4)
    h.run()
    stats = h.core.stats()
    assert stats.generation_tokens == 8 and stats.prompt_tokens == 34
    assert stats.prompt_tokens_cached == stats.prefix_cache_hits == 16 and stats.prefix_cache_queries == 34
    assert stats.request_success == {"length": 2}
    assert stats.num_requests_running == stats.num_requests_waiting == 0
    for name, count in (("time_to_first_token_seconds", 2), ("inter_token_latency_seconds", 6), ("e2e_request_latency_seconds", 2),
                        ("request_decode_time_seconds", 2), ("request_queue_time_seconds", 2), ("iteration_tokens_total", stats.num_steps)):
        assert stats.histograms[name].count == count, name
    metrics = h.finished["a", 0].metrics
    assert metrics is not None
    assert 0 < metrics.queued_time < metrics.scheduled_time < metrics.first_token_time < metrics.last_token_time
