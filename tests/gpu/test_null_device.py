"""The whole GPU path without a GPU: the answers are those of the CPU, whatever is asked, however it is batched."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from pagoda.base.types import GenerateRequest, SamplingParams
from pagoda.engine.grammars import Grammars
from pagoda.executor.launch import LocalEngine
from tests.e2e.harness import Answer, generate
from tests.gpu.harness import checkpoint, cpu_engine, null_engine, runner_of
from tests.models import tiny

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=0: the null device needs the interpreter")

VOCAB = tiny.SHAPE["vocab_size"]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(7 * i + 31 * seed + 3) % (VOCAB - 3) + 3 for i in range(length)]


PROMPTS = {"greedy": prompt(5), "drawn": prompt(30, 1), "scored": prompt(7, 2), "penal": prompt(3, 3)}
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=4, ignore_eos=True),
    "drawn": SamplingParams(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01, seed=7, max_tokens=5, ignore_eos=True),
    "scored": SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, max_tokens=3, ignore_eos=True),
    "penal": SamplingParams(temperature=0.8, seed=5, repetition_penalty=1.3, min_tokens=2, max_tokens=3, ignore_eos=True),
}


def assert_same(found: dict[str, Answer], expected: dict[str, Answer]) -> None:
    assert {name: a.token_ids for name, a in found.items()} == {name: a.token_ids for name, a in expected.items()}
    for name, answer in found.items():
        for mine, theirs in zip(answer.logprobs, expected[name].logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama", tmp_path_factory.mktemp("gpu"))


def test_answers_are_the_cpus(llama: Path) -> None:
    """Prompts in chunks, graphs with padding, draws on the device and on the host, steps that overlap."""
    expected = generate(cpu_engine(llama), PROMPTS, PARAMS)
    local = null_engine(llama)
    assert_same(generate(local, PROMPTS, PARAMS), expected)
    runner = runner_of(local)
    assert runner.mode[0] == "graphs" and runner._forward.num_replays > 0
    assert "attention_backend" in {reason.name for reason in local.ledger.reasons}


def test_without_graphs_and_overlap_answers_are_the_same(llama: Path) -> None:
    prompts, params = {"drawn": PROMPTS["drawn"][:20]}, {"drawn": PARAMS["drawn"].clone(max_tokens=3)}
    found = [
        generate(null_engine(llama, **options), prompts, params)
        for options in ({}, {"enforce_eager": True, "async_scheduling": False})
    ]
    assert_same(found[0], found[1])


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "llama-linear-rope-bias"])
def test_families(family: str, tmp_path: Path) -> None:
    """Norms of heads, windows with two KV groups, soft caps, biases."""
    path = checkpoint(family, tmp_path)
    prompts = {"a": prompt(26)}  # beyond the window
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    assert_same(generate(null_engine(path), prompts, params), generate(cpu_engine(path), prompts, params))


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_attention_by_torch(family: str, tmp_path: Path) -> None:
    """The fallback: prompts in chunks, several sequences, a window."""
    path = checkpoint(family, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    prompts = {"a": prompt(27), "b": prompt(4, 2)}
    local = null_engine(path, attention_backend="sdpa")
    assert local.ledger.mode == "op by op" and "sdpa" in local.ledger.mode_why
    assert_same(generate(local, prompts, params), generate(cpu_engine(path), prompts, params))


def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    path, model = tiny.make("llama", tmp_path, num_hidden_layers=2)
    ids = prompt(9)
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = generate(null_engine(path), {"a": ids}, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert found["a"].token_ids == out[0, len(ids) :].tolist()


def test_quantized_weights_and_8_bit_cache_in_16_bits(tmp_path: Path) -> None:
    """It runs and stays near: bfloat16 activations, int8 weights, fp8 keys and values, tiles that do not depend on the batch."""
    path = checkpoint("qwen3", tmp_path)
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=0, ignore_eos=True)
    expected = generate(cpu_engine(path), {"a": prompt(12)}, params)["a"]
    local = null_engine(path, dtype="bfloat16", quantization="int8", kv_cache_dtype="fp8", batch_invariant=True, enforce_eager=True)
    found = generate(local, {"a": prompt(12)}, params)["a"]
    assert len(found.token_ids) == 2 and "q8_0" in local.ledger.formats
    assert found.logprobs[0][0] == pytest.approx(expected.logprobs[0][0], abs=1.0)
    assert local.ledger.kv_nbytes == local.ledger.num_blocks * 2 * 16 * 2 * 32 * 2  # planes, block, heads, width, k and v: a byte each


def test_a_preempted_request_goes_on_with_the_same_tokens(llama: Path) -> None:
    local = null_engine(llama)
    expected = generate(cpu_engine(llama), {"drawn": PROMPTS["drawn"]}, PARAMS["drawn"])
    core = local.core
    core.add(GenerateRequest(request_id="drawn", prompt_token_ids=PROMPTS["drawn"], params=PARAMS["drawn"].clone()))
    tokens: list[int] = []
    steps = 0
    while core.has_work():
        tokens += [token for out in core.step() for token in out.new_token_ids]
        steps += 1
        if steps == 3:
            core._scheduler.preempt(core._scheduler.running[0])
    assert tokens == expected["drawn"].token_ids
    core.check_integrity()


class _Masks:
    """A synthetic grammar: token i of an answer is `first + i`."""

    def __init__(self, first: int, place: int = 0) -> None:
        self.first, self.place = first, place

    def mask(self) -> bytes:
        return (1 << (self.first + self.place)).to_bytes((VOCAB + 31) // 32 * 4, "little")

    def accept(self, token_id: int) -> str | None:
        wrong = None if token_id == self.first + self.place else f"{token_id}"
        self.place += 1
        return wrong

    def forced(self) -> list[int]:
        return []

    def copy(self) -> _Masks:
        return _Masks(self.first, self.place)


class Compiler:
    def compile(self, grammar: str, eos_token_ids: Any) -> _Masks:
        return _Masks(int(grammar))


def test_masks_delay_their_own_row_and_no_forward(llama: Path) -> None:
    local = null_engine(llama)
    local.core._grammars = Grammars(Compiler(), time.monotonic)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    free = generate(cpu_engine(llama), {"free": prompt(6)}, params)["free"].token_ids
    found = _run(local, [("masked", prompt(4, 5), "50"), ("free", prompt(6), None)], params)
    assert found == {"masked": [50, 51, 52], "free": free}
    found = _run(local, [("again", prompt(4, 6), "60")], params)
    assert found == {"again": [60, 61, 62]}


def _run(local: LocalEngine, requests: list[tuple[str, list[int], str | None]], params: SamplingParams) -> dict[str, list[int]]:
    for name, ids, grammar in requests:
        local.core.add(GenerateRequest(request_id=name, prompt_token_ids=ids, params=params.clone(), grammar=grammar))
    found: dict[str, list[int]] = {name: [] for name, _, _ in requests}
    while local.core.has_work():
        for out in local.core.step():
            assert out.error is None, out.error
            found[out.request_id] += out.new_token_ids
    return found


def test_a_request_whose_logits_are_not_finite_fails_alone(llama: Path) -> None:
    """Both where its tokens are drawn on the device and where they are drawn on the host."""
    local = null_engine(llama, enforce_eager=True)
    embed = local.executor.runner._forward._model._embed._weight.data  # type: ignore[attr-defined]
    with torch.inference_mode():
        embed[150] = float("nan")
    prompts = {"bad": [150, 5], "good": prompt(5), "scored": [150, 9]}
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    for name, ids in prompts.items():
        chosen = params.clone(logprobs=1) if name == "scored" else params
        local.core.add(GenerateRequest(request_id=name, prompt_token_ids=ids, params=chosen))
    ends = {}
    while local.core.has_work():
        ends.update({out.request_id: out for out in local.core.step() if out.finish_reason is not None})
    assert "not finite" in (ends["bad"].error or "") and "not finite" in (ends["scored"].error or "")
    assert ends["good"].error is None
    local.core.check_integrity()
