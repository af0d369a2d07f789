"""Steps that overlap: tokens are planned before they are known, and nobody can tell from the answers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.base.errors import InvalidRequest
from pagoda.base.plan import StepPlan
from pagoda.base.types import SamplingParams
from tests.engine.fake_executor import VOCAB
from tests.engine.harness import FULL, MIXED, WINDOW, Harness
from tests.engine.test_grammars import Rig


def test_the_next_step_is_planned_before_the_token_is_known() -> None:
    h = Harness(pipeline_depth=2)
    h.add("a", 9, max_tokens=5)
    assert h.core.launch() and h.core.launch()
    assert h.tokens_of_plan(0) == [(0, 0, 9)] and h.tokens_of_plan(1) == [(0, 9, 1)]
    assert not h.tokens["a", 0]
    h.run()
    h.check_sample("a")
    h.check_whole()


def test_a_known_end_is_not_planned_beyond() -> None:
    h = Harness(pipeline_depth=3)
    h.add("a", 9, max_tokens=2)
    h.run()
    h.check_sample("a")
    assert [plan.num_tokens for plan in h.executor.plans] == [9, 1]


def test_the_extra_step_of_a_request_that_ended_is_discarded() -> None:
    """A token that ends it is drawn while its next step is in flight: blocks and slot stay until that has settled."""
    h = Harness(pipeline_depth=2, prefix_caching=False)
    first = Harness()
    first.add("a", 9, max_tokens=6)
    first.run()
    ending = first.tokens["a", 0][2]
    h.add("a", 9, max_tokens=6, stop_token_ids=[ending])
    while not h.finished:
        h.step()
    assert h.core._in_flight and h.core._in_flight[0].rows[0].is_stale
    assert h.core._kv.pool.num_fenced == 3 and h.core._scheduler.slots.num_free == 7
    h.run()
    assert h.tokens["a", 0] == first.tokens["a", 0][:3] and h.reason("a") == "stop"
    h.check_whole()


@pytest.mark.parametrize("special", [{"dry_multiplier": 0.5}, {"logprobs": -1}, {"prompt_logprobs": 0}, {"bad_words_token_ids": [[3, 4]]}])
def test_what_is_drawn_on_the_host_is_not_planned_ahead(special: dict[str, Any]) -> None:
    h = Harness(pipeline_depth=2)
    h.add("a", 9, max_tokens=5, **special)
    h.add("b", [5] * 9, max_tokens=5)
    h.core.launch()
    h.core.launch()
    assert h.tokens_of_plan(1) == [(1, 9, 1)], "only the plain one goes on"
    h.run()
    h.check_all()


@pytest.mark.parametrize("special", [{"logprobs": 3}, {"min_tokens": 2}, {"repetition_penalty": 1.5}, {"logit_bias": {3: 1.0}}, {"bad_words_token_ids": [[3], [4]]}])
def test_what_the_device_does_by_itself_is_planned_ahead(special: dict[str, Any]) -> None:
    h = Harness(pipeline_depth=2)
    h.add("a", 9, max_tokens=5, **special)
    h.core.launch()
    h.core.launch()
    assert h.tokens_of_plan(1) == [(0, 9, 1)] and not h.tokens["a", 0]
    h.run()
    h.check_all()


def test_a_mask_delays_only_its_own_row() -> None:
    """Forwards go on without the row whose mask is not there yet."""
    rig = Rig(pipeline_depth=2)
    rig.guided("a", "1,2,3", prompt=6)
    rig.add("free", [9] * 5, max_tokens=8)
    rig.run()
    assert rig.tokens["a", 0][:3] == [1, 2, 3] and rig.reason("a") == "stop"
    rig.check_sample("free")
    free = [plan.step for plan in rig.executor.plans if any(row.slot == 1 for row in plan.scheduled)]
    guided = [plan.step for plan in rig.executor.plans if any(row.slot == 0 for row in plan.scheduled)]
    assert all(b - a == 1 for a, b in itertools.pairwise(free)), "it is in every step from its first to its last"
    assert all(b - a == 2 for a, b in itertools.pairwise(guided) if b <= free[-1])
    rig.check_whole()


def test_a_late_step_may_have_to_be_the_last() -> None:
    """Where the next forward would overwrite the logits that a row is still to be drawn from, as on a CPU."""
    h = Harness(pipeline_depth=2, overlaps_late=False)
    h.add("plain", 9, max_tokens=9)
    h.add("special", [5] * 9, max_tokens=3, dry_multiplier=0.5)
    while not h.finished:
        h.step()
        assert len(h.core._in_flight) <= 1, "both rows are in every step, and nothing is in flight when it is planned"
    assert all(len(plan.scheduled) == 2 for plan in h.executor.plans)
    h.step()
    assert h.core._in_flight, "from now on steps overlap"
    h.run()
    h.check_all()
    h.check_whole()


def test_scored_prompts_are_late_in_every_chunk() -> None:
    h = Harness(pipeline_depth=2, overlaps_late=False, max_num_batched_tokens=4)
    h.add("scored", 9, max_tokens=3, prompt_logprobs=0)
    for _ in range(3):
        h.step()
        assert not h.core._in_flight
    h.run()
    h.check_all()


def test_the_brain_and_a_cpu_agree_on_who_draws() -> None:
    """`is_drawn_by_forward` promises that no row of the request is special to the worker, whatever field is set."""
    from pagoda.base.plan import NewRequest
    from pagoda.worker.table import RequestTable

    table = RequestTable(max_num_seqs=1, max_model_len=20, num_groups=1, max_blocks=2)
    plain = {"temperature": 0.3, "top_p": 0.5, "top_k": 4, "min_p": 0.1, "seed": 8, "ignore_eos": True, "stop_token_ids": [3], "n": 2}
    special: dict[str, Any] = {
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": 3, "logprobs": 0, "prompt_logprobs": 0,
        "logit_bias": {3: 1.0}, "allowed_token_ids": [1, 2], "bad_words_token_ids": [[4]], "typical_p": 0.5, "top_n_sigma": 1.0,
        "dynatemp_range": 0.2, "xtc_probability": 0.5, "dry_multiplier": 0.8, "mirostat_mode": 2,
    }  # fmt: skip
    for name, value in (plain | special).items():
        params = SamplingParams(**{"temperature": 0.7, "max_tokens": 9, "seed": 1, name: value})
        assert params.is_drawn_by_forward == (name in plain), name
        table.apply(StepPlan(step=0, released_slots=[0], new=[NewRequest(slot=0, request_id="a", token_ids=[1], num_prompt_tokens=1, params=params, block_ids=[[1]])]))
        assert (table.is_redrawn_N[0] or table.wants_prompt_logprobs_N[0]) == (name in special), name


def test_the_brain_and_a_device_agree_on_who_draws() -> None:
    """`is_drawn_on_device`, which the brain goes by, against what the device's worker makes of the same request, whatever field is set."""
    pytest.importorskip("torch", reason="the device's worker computes with it")
    from pagoda.worker.device_steps import Kind, kind_of
    from pagoda.worker.logits.chain import chain_of

    odd: dict[str, Any] = {
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": 3, "logprobs": 2, "prompt_logprobs": 1,
        "logit_bias": {3: 1.0}, "allowed_token_ids": [1, 2], "bad_words_token_ids": [[4]], "typical_p": 0.5, "top_n_sigma": 1.0,
        "dynatemp_range": 0.2, "xtc_probability": 0.5, "dry_multiplier": 0.8, "mirostat_mode": 2, "temperature": 0.3, "top_p": 0.5,
        "top_k": 4, "min_p": 0.1, "seed": 8, "ignore_eos": True, "stop_token_ids": [3],
    }  # fmt: skip
    assert set(odd) <= set(SamplingParams.__struct_fields__)
    on_host = {"prompt_logprobs", "typical_p", "top_n_sigma", "dynatemp_range", "xtc_probability", "dry_multiplier", "mirostat_mode"}
    cases = [(name, {name: value}) for name, value in odd.items()]
    cases += [("many", {"logprobs": -1}), ("drawn", {"logprobs": 1, "logprobs_mode": "processed_logprobs"}), ("word", {"bad_words_token_ids": [[4, 5]]}),
              ("ids", {"logprobs": 0, "logprob_token_ids": [3]}), ("logits", {"logprobs": 1, "logprobs_mode": "raw_logits"})]  # fmt: skip
    for name, fields in cases:
        params = SamplingParams(**{"temperature": 0.7, "max_tokens": 9, **fields})
        kind = kind_of(params, chain_of(params), is_guided=False)
        is_early = kind in (Kind.PLAIN, Kind.STEPS) and params.prompt_logprobs is None  # while prompts are scored, rows are the host's
        assert params.is_drawn_on_device == is_early == (name not in on_host | {"many", "drawn", "word", "ids"}), name


_requests = st.fixed_dictionaries(
    {
        "num_prompt": st.integers(1, 40),
        "max_tokens": st.integers(1, 15),
        "min_tokens": st.sampled_from([0, 0, 0, 2]),
        "logprobs": st.sampled_from([None, None, None, 0, -1]),
        "n": st.sampled_from([1, 1, 2]),
        "eos": st.booleans(),
        "at": st.integers(0, 12),  # the step before which it arrives
        "abort_at": st.sampled_from([None, None, None, 3, 6]),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    groups=st.sampled_from([FULL, WINDOW, MIXED]), num_blocks=st.integers(14, 60), budget=st.sampled_from([5, 16, 64]),
    preempt_at=st.sampled_from([None, 2, 4]), overlaps_late=st.booleans(), specs=st.lists(_requests, min_size=1, max_size=6),
)  # fmt: skip
def test_depths_give_the_same_tokens(groups: Any, num_blocks: int, budget: int, preempt_at: int | None, overlaps_late: bool, specs: list[dict[str, Any]]) -> None:
    answers = [_live(depth, groups, num_blocks, budget, preempt_at, overlaps_late, specs) for depth in (1, 2, 3)]
    for name in set.intersection(*(set(answer) for answer in answers)):
        shortest = min(len(answer[name][0]) for answer in answers)
        for tokens, reason in (answer[name] for answer in answers):
            if reason == "abort":
                assert tokens[:shortest] == answers[0][name][0][:shortest]
            else:
                assert (tokens, reason) == answers[0][name] or answers[0][name][1] == "abort"


def _live(
    depth: int, groups: Any, num_blocks: int, budget: int, preempt_at: int | None, overlaps_late: bool, specs: list[dict[str, Any]]
) -> dict[tuple[str, int], tuple[list[int], str]]:  # fmt: skip
    h = Harness(groups=groups, num_blocks=num_blocks, max_num_batched_tokens=budget, pipeline_depth=depth, overlaps_late=overlaps_late)
    left = list(enumerate(specs))
    for step in range(3000):
        for number, spec in [item for item in left if item[1]["at"] <= step]:
            left.remove((number, spec))
            params = {name: spec[name] for name in ("max_tokens", "logprobs", "n")}
            params["min_tokens"] = min(spec["min_tokens"], spec["max_tokens"])
            prompt = [(number * 11 + i) % VOCAB for i in range(spec["num_prompt"])]
            try:
                h.add(f"r{number}", prompt, eos=[7, 21] if spec["eos"] else None, **params)
            except InvalidRequest as error:  # windows hold more when steps overlap
                assert "KV blocks" in str(error)
        for number, spec in enumerate(specs):
            if spec["abort_at"] is not None and step == spec["at"] + spec["abort_at"]:
                h.core.abort([f"r{number}"])
        if step == preempt_at and h.core._scheduler.running:
            h.core._scheduler.preempt(h.core._scheduler.running[-1])
        if not left and not h.core.has_work():
            break
        if h.core.has_work():
            h.step()
    h.check_whole()
    return {key: (h.tokens[key], out.finish_reason.value) for key, out in h.finished.items() if out.finish_reason is not None}
