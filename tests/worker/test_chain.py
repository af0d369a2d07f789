"""Every step of the sampler chain against a reference that reads like its paper, and what holds for all of them."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.base.errors import ConfigError, InvalidRequest
from pagoda.base.plan import Masks, NewRequest, Scheduled, StepPlan
from pagoda.base.types import SamplingParams
from pagoda.kernels.reference.sample import philox_uniform
from pagoda.worker.batch import BatchBuilder, Sizes
from pagoda.worker.logits import SHAPERS, STEPS, LogitsStep, Mirostat, RowContext, chain_of, load_processors
from pagoda.worker.logits.truncate import head, smallest
from pagoda.worker.logits.xtc import xtc_uniform
from pagoda.worker.sampler import Sampler
from pagoda.worker.table import RequestTable
from tests.worker import chain_reference as reference
from tests.worker.test_sampler import VOCAB, chosen, greedy, logits, run

ROW = np.random.default_rng(5).standard_normal(VOCAB).astype(np.float32) * 3
ROWS = [(ROW * scale).astype(np.float32) for scale in (0.1, 1.0, 4.0)]
TEMPERATURES = [0.5, 1.0, 1.7]


def shaped(row: np.ndarray, params: SamplingParams, ids: list[int] | None = None) -> np.ndarray:
    """The row after the chain, before the draw."""
    row = row.copy()
    chain = chain_of(params)
    context = RowContext(params, np.array(ids or [1, 2, 3], np.int32), 1, [])
    for step in (*chain.steps, *chain.shapers):
        step.apply(row, context)
    return row


def assert_same(found: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    np.testing.assert_allclose(found, np.array(expected, np.float32), rtol=2e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("row", ROWS, ids=["flat", "plain", "sharp"])
class TestAgainstReference:
    @pytest.mark.parametrize("n", [0.3, 1.0, 2.5])
    def test_top_n_sigma(self, row: np.ndarray, temperature: float, n: float) -> None:
        assert_same(shaped(row, SamplingParams(temperature=temperature, top_n_sigma=n)), reference.top_n_sigma(row.tolist(), n))

    @pytest.mark.parametrize("mass", [0.2, 0.9])
    def test_typical(self, row: np.ndarray, temperature: float, mass: float) -> None:
        assert_same(shaped(row, SamplingParams(temperature=temperature, typical_p=mass)), reference.typical(row.tolist(), temperature, mass))

    @pytest.mark.parametrize(("spread", "exponent"), [(0.3, 1.0), (1.9, 2.0)])
    def test_dynamic_temperature(self, row: np.ndarray, temperature: float, spread: float, exponent: float) -> None:
        found = shaped(row, SamplingParams(temperature=temperature, dynatemp_range=spread, dynatemp_exponent=exponent))
        wanted = reference.dynamic_temperature(row.tolist(), temperature, spread, exponent)
        np.testing.assert_allclose(reference.softmax(found.tolist(), temperature), reference.softmax(row.tolist(), wanted), rtol=1e-4, atol=1e-12)

    @pytest.mark.parametrize("threshold", [0.02, 0.1])
    def test_xtc_sees_what_the_truncations_left(self, row: np.ndarray, temperature: float, threshold: float) -> None:
        params = SamplingParams(
            temperature=temperature, top_k=20, top_p=0.95, min_p=0.01, xtc_probability=1.0, xtc_threshold=threshold, seed=3
        )
        left = reference.truncated(row.tolist(), temperature, 0.01, 20, 0.95)
        assert_same(shaped(row, params), reference.xtc(left, temperature, threshold))

    @pytest.mark.parametrize("mu", [0.0, 3.0, 6.0])
    def test_mirostat(self, row: np.ndarray, temperature: float, mu: float) -> None:
        found, params = row.copy(), SamplingParams(temperature=temperature, mirostat_mode=2, mirostat_tau=mu / 2)
        Mirostat().apply(found, RowContext(params, np.array([1, 2], np.int32), 2, []), "a")
        assert_same(found, reference.mirostat(row.tolist(), temperature, mu))


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    allowed=st.integers(0, 4),
    base=st.sampled_from([1.0, 1.2, 1.75, 4.0]),
    breakers=st.sets(st.integers(0, 3), max_size=2),
    span=st.sampled_from([0, 1, 5, 12]),
)
def test_dry(ids: list[int], allowed: int, base: float, breakers: set[int], span: int) -> None:
    params = SamplingParams(
        temperature=0, dry_multiplier=0.8, dry_base=base, dry_allowed_length=allowed, dry_breaker_ids=sorted(breakers), dry_range=span
    )
    text = ids[-span:] if span else ids
    assert_same(shaped(ROW, params, ids), reference.dry(ROW.tolist(), text, 0.8, base, allowed, breakers))


def test_dry_breaks_a_loop_of_greedy_text() -> None:
    row = logits((7, 3.0), (11, 1.0))
    text = [5, 6, 7, 4, 5, 6]
    assert chosen(greedy(), row, output=text) == 7
    assert chosen(greedy(dry_multiplier=5.0, dry_allowed_length=2), row, output=text) == 11
    assert chosen(greedy(dry_multiplier=5.0, dry_allowed_length=3), row, output=text) == 7, "two tokens may repeat"
    assert chosen(greedy(dry_multiplier=5.0, dry_allowed_length=2, dry_breaker_ids=[5]), row, output=text) == 7


def test_dry_of_a_long_loop_ends() -> None:
    found = shaped(ROW, greedy(dry_multiplier=1.0), [4] * 20_000)
    assert found[4] == np.float32(ROW[4] - 1e4)


def test_xtc_acts_with_its_own_numbers() -> None:
    """Where it acts depends on seed and position; the number of the draw is another one."""
    params = SamplingParams(temperature=1.0, xtc_probability=0.5, xtc_threshold=0.05, seed=11)
    acted = []
    for length in range(1, 60):
        found = shaped(ROW, params, [1] * length)
        assert (np.isinf(found).sum() > 0) == (xtc_uniform(11, length) < 0.5)
        acted.append(bool(np.isinf(found).any()))
    assert 15 < sum(acted) < 45
    assert all(xtc_uniform(11, i) != philox_uniform(11, i) for i in range(60))
    assert not np.isinf(shaped(ROW, params.clone(xtc_threshold=0.51))).any(), "no two tokens have more than half"


def test_the_draw_does_not_truncate_again_behind_xtc() -> None:
    """After XTC the rest is renormalized, and top_p over that would be another top_p."""
    params = SamplingParams(temperature=1.0, top_p=0.9, xtc_probability=1.0, xtc_threshold=0.05, seed=0)
    left = set(np.flatnonzero(np.isfinite(shaped(ROW, params))).tolist())
    drawn = {chosen(params.clone(seed=seed), ROW[None]) for seed in range(1, 400)}
    assert drawn <= left and len(left) > 1
    rarest = min(left, key=lambda i: ROW[i])
    p = np.exp(ROW[sorted(left)].astype(np.float64))
    if p.min() / p.sum() > 0.02:
        assert rarest in drawn


def test_greedy_rows_are_not_shaped() -> None:
    params = greedy(top_n_sigma=0.1, typical_p=0.1, dynatemp_range=1.0, xtc_probability=1.0, mirostat_mode=2)
    assert not chain_of(params)
    assert chosen(params, logits((7, 3.0), (11, 2.9))) == 7


def test_neutral_values_change_nothing() -> None:
    assert not chain_of(SamplingParams())
    assert not chain_of(SamplingParams(top_n_sigma=-1, typical_p=1, xtc_probability=0, dry_multiplier=0, mirostat_mode=0))


def test_rows_are_independent() -> None:
    """Whatever the neighbours ask for, a row's token is its own."""
    kinds: list[dict[str, Any]] = [
        {}, {"typical_p": 0.5}, {"top_n_sigma": 0.8}, {"dynatemp_range": 0.5}, {"xtc_probability": 1.0, "xtc_threshold": 0.05, "top_p": 0.9},
        {"dry_multiplier": 2.0}, {"mirostat_mode": 2, "mirostat_tau": 2.0}, {"logprobs": 2, "logprobs_mode": "processed_logprobs"},
    ]  # fmt: skip
    params = [SamplingParams(temperature=0.9, seed=i + 1, **kind) for i, kind in enumerate(kinds)]
    together = [row.token_ids[0] for row in run(params, np.repeat(ROW[None], len(params), 0))]
    assert together == [chosen(each, ROW[None]) for each in params]


@settings(max_examples=150, deadline=None)
@given(values=st.lists(st.integers(0, 50), min_size=1, max_size=600), count=st.integers(1, 700), share=st.floats(0.01, 1.0))
def test_heads_without_sorting_everything_are_those_of_sorting(values: list[int], count: int, share: float) -> None:
    keys = np.array(values, np.float64)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert smallest(keys, count).tolist() == order[:count]
    mass = np.array([1 + value for value in values], np.float64)
    sums = np.cumsum(mass[order])
    expected = order[: int(np.searchsorted(sums, share * mass.sum(), side="left")) + 1]
    assert head(keys, mass, share).tolist() == expected


# ---- mirostat's state


def surprise(row: np.ndarray, token: int) -> float:
    return -math.log2(reference.softmax(row.tolist())[token])


def mirostat_run(steps: int, preempt_at: int | None = None, tau: float = 2.0) -> list[int]:
    """Tokens of one request over the same logits; with a preemption it comes back in another slot with all its tokens."""
    params = SamplingParams(temperature=1.0, mirostat_mode=2, mirostat_tau=tau, mirostat_eta=0.3, seed=5)
    table = RequestTable(max_num_seqs=2, max_model_len=64, num_groups=1, max_blocks=4)
    builder, sampler = BatchBuilder(Sizes(64, 2, 64, 4), 1, 16), Sampler()
    known, slot = [1, 2], 0
    for step in range(steps):
        released: list[int] = []
        new: list[NewRequest] = []
        if step == 0 or step == preempt_at:
            released, slot = ([], 0) if step == 0 else ([slot], 1)
            new = [NewRequest(slot=slot, request_id="r", token_ids=known, num_prompt_tokens=2, params=params, block_ids=[[1]])]
        plan = StepPlan(step=step, new=new, released_slots=released, scheduled=[Scheduled(slot, len(known) - 1, 1)])
        table.apply(plan)
        rows = builder.build(plan, table)
        known = known + sampler.sample(ROWS[1][None].copy(), rows, table)[0].token_ids
    return known[2:]


def test_mirostat_survives_preemption_and_starts_afresh_for_a_new_request() -> None:
    whole = mirostat_run(30)
    assert mirostat_run(30, preempt_at=13) == whole
    state = Mirostat()
    params = SamplingParams(temperature=1.0, mirostat_mode=2)
    old = RowContext(params, np.array([1, 2, 3], np.int32), 2, [])
    state.observe(ROW.copy(), old, "r", 5)
    assert state._mu(RowContext(params, np.array([1, 2, 3, 5], np.int32), 2, []), "r") != 10.0
    assert state._mu(RowContext(params, np.array([1, 2, 3, 5], np.int32), 4, []), "r") == 10.0, "a prompt of that length"
    assert state._mu(old, "other") == 10.0


def test_mirostat_holds_the_surprise() -> None:
    """The mean surprise follows tau, as far as the distribution can go."""
    means = [float(np.mean([surprise(ROWS[1], token) for token in mirostat_run(60, tau=tau)])) for tau in (0.5, 2.5)]
    assert means[0] < means[1]


def test_mirostat_forgets_the_oldest() -> None:
    state = Mirostat(capacity=2)
    row = RowContext(SamplingParams(temperature=1.0, mirostat_mode=2), np.array([1, 2], np.int32), 1, [])
    for name in "abc":
        state.observe(ROW.copy(), row, name, 4)
    assert list(state._states) == ["b", "c"]


# ---- logprobs_mode


def test_logprobs_modes() -> None:
    params = SamplingParams(temperature=0.7, top_k=3, logprobs=5, logit_bias={4: 2.0}, seed=1)
    biased = ROW.copy()
    biased[4] += 2.0
    left = reference.truncated(biased.tolist(), 0.7, 0.0, 3, 1.0)
    scaled = np.array(left) / 0.7
    expected = {
        "raw_logits": ROW.astype(np.float64),
        "raw_logprobs": np.log(reference.softmax(ROW.tolist())),
        "processed_logits": scaled,
        "processed_logprobs": scaled - np.log(np.exp(scaled[np.isfinite(scaled)]).sum()),
    }
    tokens = set()
    for mode, values in expected.items():
        found = run([params.clone(logprobs_mode=mode)], ROW[None].copy())[0]
        assert found.logprobs is not None
        tokens.add(found.token_ids[0])
        np.testing.assert_allclose(found.logprobs[0].logprobs, values[found.logprobs[0].token_ids], rtol=1e-4, atol=1e-5, err_msg=mode)
    assert len(tokens) == 1, "what is told about a token does not change which one it is"


def test_processed_logprobs_of_greedy_rows_are_those_of_the_steps() -> None:
    found = run([greedy(logprobs=2, logit_bias={11: 5.0}, logprobs_mode="processed_logits")], logits((7, 3.0), (11, 1.0)))[0]
    assert found.logprobs is not None and found.logprobs[0].token_ids == [11, 11, 7]
    assert found.logprobs[0].logprobs == [6.0, 6.0, 3.0]


# ---- plug-ins


class Shout:
    def wants(self, params: SamplingParams) -> bool:
        return bool((params.extra_args or {}).get("shout"))

    def apply(self, logits_V: Any, row: RowContext) -> None:
        logits_V[(row.params.extra_args or {})["shout"]] += 50


class Breaks(Shout):
    def apply(self, logits_V: Any, row: RowContext) -> None:
        logits_V[0] = np.nan if (row.params.extra_args or {})["shout"] == 1 else logits_V["no"]


def plugin_run(kind: str, extra: list[dict[str, Any] | None]) -> list[Any]:
    module = ModuleType("pagoda_test_plugin")
    module.__dict__.update(Shout=Shout, Breaks=Breaks)
    sys.modules[module.__name__] = module
    processors: tuple[LogitsStep, ...] = load_processors([f"pagoda_test_plugin:{kind}"])
    count = len(extra)
    table = RequestTable(max_num_seqs=count, max_model_len=64, num_groups=1, max_blocks=4, processors=processors)
    builder = BatchBuilder(Sizes(64, count, 64, 4), 1, 16)
    new = [
        NewRequest(slot=i, request_id=str(i), token_ids=[1, 2], num_prompt_tokens=2, block_ids=[[1 + i]], params=greedy(seed=1, extra_args=args))
        for i, args in enumerate(extra)
    ]  # fmt: skip
    plan = StepPlan(step=0, new=new, scheduled=[Scheduled(i, 1, 1) for i in range(count)])
    table.apply(plan)
    return Sampler().sample(np.repeat(logits((7, 3.0)), count, 0), builder.build(plan, table), table)


def test_a_plug_in_sees_the_rows_that_ask_for_it() -> None:
    assert [row.token_ids for row in plugin_run("Shout", [None, {"shout": 12}, {"other": 1}])] == [[7], [12], [7]]


def test_a_plug_in_that_fails_costs_one_request() -> None:
    found = plugin_run("Breaks", [None, {"shout": 12}, {"shout": 1}, None])
    assert [row.token_ids for row in found] == [[7], [], [], [7]]
    assert "IndexError" in found[1].error and "not numbers" in found[2].error


@pytest.mark.parametrize(("name", "message"), [("nothing", "package.module:Class"), ("no.such:Thing", "cannot be loaded"), ("math:sqrt", "cannot be loaded"), ("collections:OrderedDict", "no method `wants` and no `apply`")])
def test_plug_ins_that_cannot_be_used_are_refused_at_start(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_processors([name])


def test_a_bug_in_a_step_of_ours_costs_one_request_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: object, logits_V: Any, row: RowContext) -> None:
        raise IndexError("out of it")

    monkeypatch.setattr(type(SHAPERS[0]), "apply", wrong)
    found = run([greedy(), SamplingParams(top_n_sigma=1.0, seed=1)], np.repeat(logits((7, 3.0)), 2, 0))
    assert found[0].token_ids == [7] and found[1].error is not None and "out of it" in found[1].error


# ---- parameters


@pytest.mark.parametrize("bad", [
    {"typical_p": 0.0}, {"typical_p": 1.1}, {"top_n_sigma": -2.0}, {"dynatemp_range": 3.0}, {"dynatemp_exponent": 0.0}, {"xtc_probability": 1.5},
    {"xtc_threshold": -0.1}, {"dry_multiplier": -1.0}, {"dry_base": 0.5}, {"dry_allowed_length": -1}, {"dry_range": -2}, {"mirostat_mode": 1},
    {"mirostat_tau": float("nan")}, {"mirostat_eta": 2.0}, {"banned_strings": [""]}, {"dry_sequence_breakers": ["x"] * 65},
])  # fmt: skip
def test_values_out_of_range_name_their_field(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**bad)
    assert caught.value.param == next(iter(bad))


def test_the_documented_order_is_the_order() -> None:
    assert [type(step).__name__ for step in STEPS] == ["AllowedTokens", "BadWords", "MinTokens", "LogitBias", "Penalties", "Dry"]
    assert [type(step).__name__ for step in SHAPERS] == ["TopNSigma", "DynamicTemperature", "TypicalP", "Truncate", "Xtc"]


# ---- nothing a request may ask for can fail a step


def extreme(low: float, high: float) -> st.SearchStrategy[float]:
    return st.sampled_from([low, high, (low + high) / 2, low + (high - low) * 1e-6]) | st.floats(low, high)


WHATEVER = st.fixed_dictionaries(
    {},
    optional={
        "temperature": extreme(0.01, 2.0), "top_p": extreme(1e-9, 1.0), "top_k": st.sampled_from([-1, 0, 1, 3, 10**6]), "min_p": extreme(0.0, 1.0),
        "typical_p": extreme(1e-9, 1.0), "top_n_sigma": extreme(0.0, 1000.0), "dynatemp_range": extreme(0.0, 2.0), "dynatemp_exponent": extreme(1e-3, 100.0),
        "xtc_probability": extreme(0.0, 1.0), "xtc_threshold": extreme(0.0, 1.0), "dry_multiplier": extreme(0.0, 100.0), "dry_base": extreme(1.0, 100.0),
        "dry_allowed_length": st.sampled_from([0, 1, 2, 2**31 - 1]), "dry_range": st.sampled_from([-1, 0, 1, 2**31 - 1]),
        "mirostat_mode": st.sampled_from([0, 2]), "mirostat_tau": extreme(0.0, 100.0), "mirostat_eta": extreme(0.0, 1.0),
        "repetition_penalty": extreme(0.01, 2.0), "presence_penalty": extreme(-2.0, 2.0), "logprobs": st.sampled_from([-1, 0, 3]),
        "logprobs_mode": st.sampled_from(["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]),
    },
)  # fmt: skip
KIND = st.sampled_from(["plain", "flat", "huge", "one", "ties", "tiny"])


@settings(max_examples=300, deadline=None)
@given(given_params=WHATEVER, kind=KIND, output=st.lists(st.integers(0, 3), max_size=12), seed=st.integers(1, 2**62), mask=st.sets(st.integers(0, VOCAB - 1), max_size=3))
def test_no_step_fails_and_the_token_is_one_that_was_allowed(
    given_params: dict[str, Any], kind: str, output: list[int], seed: int, mask: set[int]
) -> None:
    row = {
        "plain": ROW, "flat": np.zeros(VOCAB), "huge": ROW * 1e30, "one": np.where(np.arange(VOCAB) == 5, 1.0, -np.inf),
        "ties": np.round(ROW), "tiny": ROW * 1e-30,
    }[kind].astype(np.float32)  # fmt: skip
    masks = None
    if mask and kind != "one":
        words = np.zeros((1, 2), np.uint32)
        for token in mask:
            words[0, token // 32] |= np.uint32(1 << token % 32)
        masks = Masks(slots=[0], words=words.tobytes())
    params = SamplingParams(seed=seed, **given_params)
    with np.errstate(over="ignore"):  # a penalty may take a huge logit out of float32: that row fails, alone
        found, other = run([params, greedy()], np.repeat(row[None], 2, 0), output=output, masks=masks)
    assert other.token_ids == [int(np.argmax(row))]
    if kind == "huge" and found.error is not None:
        return
    assert found.error is None
    token = found.token_ids[0]
    assert np.isfinite(row[token]) and (masks is None or token in mask)
    if params.logprobs is not None:
        assert found.logprobs is not None and np.isfinite(found.logprobs[0].logprobs[0])
