"""What the device does to logits by itself: the tokens and log-probabilities are those of the CPU's sampler, whatever is asked."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton

from pagoda.base.types import GenerateRequest, SamplingParams
from pagoda.engine.grammars import Grammars
from pagoda.executor.launch import LocalEngine
from pagoda.worker import device_steps
from pagoda.worker.device import Null
from pagoda.worker.device_steps import Kind, Packets
from tests.e2e.harness import Answer, generate
from tests.gpu.harness import checkpoint, null_engine, runner_of
from tests.gpu.test_null_device import Compiler, prompt

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=0: the null device needs the interpreter")

DRAWN = {"temperature": 1.3, "top_p": 0.97, "max_tokens": 4, "ignore_eos": True}
ASKED: dict[str, dict[str, Any]] = {
    "repeats": {"repetition_penalty": 1.8, "frequency_penalty": 1.5, "presence_penalty": 0.5, "logprobs": 2, "seed": 1},
    "biased": {"logit_bias": {7: 30.0, 9: 29.5, 8: -100.0}, "bad_words_token_ids": [[7], [11]], "logprobs": 0, "seed": 2},
    "allowed": {"allowed_token_ids": [5, 40, 90, 130], "frequency_penalty": 2.0, "seed": 3},
    "lasting": {"min_tokens": 3, "stop_token_ids": [9, 44], "logit_bias": {9: 60.0}, "seed": 4},
    "plain": {"seed": 5},
    "scores": {"logprobs": 7, "logprobs_mode": "raw_logits", "temperature": 0.0},
    "host": {"dry_multiplier": 1.0, "logprobs": 1, "repetition_penalty": 1.4, "seed": 6},
    "cold": {"temperature": 0.0, "presence_penalty": 1.9, "repetition_penalty": 0.6},
}
PARAMS = {name: SamplingParams(**{**DRAWN, **fields}) for name, fields in ASKED.items()}
PROMPTS = {name: prompt(3 + 2 * i, i) for i, name in enumerate(ASKED)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama", tmp_path_factory.mktemp("steps"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def on_host(llama: Path) -> dict[str, Answer]:
    """The same logits, every row that is not plain drawn by the CPU's sampler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_steps, "kind_of", lambda params, chain, is_guided: Kind.HOST if is_guided or chain or params.logprobs is not None else Kind.PLAIN)
        return generate(null_engine(llama, async_scheduling=False), PROMPTS, PARAMS)


@pytest.mark.parametrize("options", [{}, {"async_scheduling": False, "enforce_eager": True}], ids=["ahead", "one by one"])
def test_answers_are_those_of_the_host(llama: Path, on_host: dict[str, Answer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties, biases, bans, log-probabilities, beside a plain row and one that only the host can draw."""
    local = null_engine(llama, **options)
    runner = runner_of(local)
    drawn_on_host: set[str] = set()
    late = runner._sample_late

    def watched(rows: Any, *args: Any) -> None:
        drawn_on_host.update(runner.table.info(int(slot)).request_id for slot in rows.slots_S[rows.late_S])
        late(rows, *args)

    monkeypatch.setattr(runner, "_sample_late", watched)
    found = generate(local, PROMPTS, PARAMS)
    assert drawn_on_host == {"host"}
    for name, expected in on_host.items():
        assert found[name].token_ids == expected.token_ids, name
        assert len(found[name].logprobs) == len(expected.logprobs) > 0 or PARAMS[name].logprobs is None
        for mine, theirs in zip(found[name].logprobs, expected.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5), name
    assert on_host["lasting"].token_ids[-1] == 9 and 9 not in on_host["lasting"].token_ids[:-1] and len(on_host["lasting"].token_ids) == 4
    assert 9 in on_host["biased"].token_ids and 7 not in on_host["biased"].token_ids


def test_a_preempted_request_is_penalized_for_the_same_tokens(llama: Path, on_host: dict[str, Answer]) -> None:
    """Its slot's counts begin again, with what it has said already."""
    local = null_engine(llama)
    core = local.core
    for name in ("allowed", "repeats"):
        core.add(GenerateRequest(request_id=name, prompt_token_ids=PROMPTS[name], params=PARAMS[name].clone()))
    tokens: dict[str, list[int]] = {"allowed": [], "repeats": []}
    steps = 0
    while core.has_work():
        for out in core.step():
            tokens[out.request_id] += out.new_token_ids
        steps += 1
        if steps == 3:
            assert all(req.runs_ahead for req in core._scheduler.running)
            core._scheduler.preempt(core._scheduler.running[0])
    assert tokens == {name: on_host[name].token_ids for name in tokens}
    core.check_integrity()


def test_the_entries_of_log_probabilities_are_those_of_the_host(llama: Path) -> None:
    """Ids in order, chosen first, ranks."""

    def entries(local: LocalEngine) -> list[Any]:
        local.core.add(GenerateRequest(request_id="a", prompt_token_ids=prompt(5), params=PARAMS["repeats"].clone(max_tokens=3)))
        found = []
        while local.core.has_work():
            found += [entry for out in local.core.step() for entry in out.logprobs or []]
        return found

    mine = entries(null_engine(llama))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_steps, "kind_of", lambda params, chain, is_guided: Kind.HOST)
        theirs = entries(null_engine(llama, async_scheduling=False))
    assert [(e.token_ids, e.rank, e.is_ranked) for e in mine] == [(e.token_ids, e.rank, e.is_ranked) for e in theirs]
    assert len(mine) == 3 and all(len(e.token_ids) == 3 for e in mine)


def test_masked_rows_are_drawn_on_the_device(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with nothing but a grammar never goes to the host; one with steps too does."""
    local = null_engine(llama)
    runner = runner_of(local)
    local.core._grammars = Grammars(Compiler(), time.monotonic)
    params = {"masked": SamplingParams(**DRAWN, seed=1), "both": SamplingParams(**DRAWN, seed=2, presence_penalty=0.5), "free": SamplingParams(**DRAWN, seed=3)}
    kept: list[int] = []
    draw = runner._extra.draw_kept
    monkeypatch.setattr(runner._extra, "draw_kept", lambda slots, *args: kept.extend(slots.tolist()) or draw(slots, *args))
    for (name, one), grammar in zip(params.items(), ("50", "70", None), strict=True):
        local.core.add(GenerateRequest(request_id=name, prompt_token_ids=prompt(4, len(name)), params=one, grammar=grammar))
    found: dict[str, list[int]] = {name: [] for name in params}
    while local.core.has_work():
        for out in local.core.step():
            assert out.error is None, out.error
            found[out.request_id] += out.new_token_ids
    assert found["masked"] == [50, 51, 52, 53] and found["both"] == [70, 71, 72, 73] and len(found["free"]) == 4
    assert len(kept) == 4 and len(set(kept)) == 1


def test_rows_that_are_not_finite_are_errors_behind_any_step(llama: Path) -> None:
    """Bans, allowed tokens and masks would hide a NaN."""
    local = null_engine(llama, enforce_eager=True)
    local.core._grammars = Grammars(Compiler(), time.monotonic)
    embed = local.executor.runner._forward._model._embed._weight.data  # type: ignore[attr-defined]
    with torch.inference_mode():
        embed[150] = float("nan")
    fields: dict[str, dict[str, Any]] = {"allowed": {"allowed_token_ids": [5]}, "scored": {"logprobs": 2}, "masked": {}, "good": {"logit_bias": {3: 1.0}}}
    for name, asked in fields.items():
        ids = prompt(5) if name == "good" else [150, 9]
        request = GenerateRequest(request_id=name, prompt_token_ids=ids, params=SamplingParams(**{**DRAWN, **asked}), grammar="50" if name == "masked" else None)
        local.core.add(request)
    ends = {}
    while local.core.has_work():
        ends.update({out.request_id: out for out in local.core.step() if out.finish_reason is not None})
    assert ends["good"].error is None
    assert all("not finite" in (ends[name].error or "") for name in ("allowed", "scored", "masked"))
    local.core.check_integrity()


def test_packets_arrive_whole_and_aligned() -> None:
    """Arrays of several types, growing beyond the memory there is at first."""
    device = Null()
    packets = Packets(device, 2, num_words=16)
    rng = np.random.default_rng(0)
    for size in (1, 7, 300, 3):
        arrays = {
            "a": rng.integers(0, 99, size).astype(np.int32), "b": rng.standard_normal(size + 1).astype(np.float32),
            "c": rng.integers(0, 2**63, size).astype(np.uint64), "d": rng.integers(0, 99, 0).astype(np.int64),
        }  # fmt: skip
        for name, got in packets.send(arrays).items():
            np.testing.assert_array_equal(got.numpy().view(arrays[name].dtype), arrays[name])
            assert (got.data_ptr() - packets._staging.words.data_ptr()) % 16 == 0
