"""What must hold on a real GPU, in its 16-bit types: run there by `make gpu-check`, and here on the null device.

Against transformers, which computes the same bfloat16 weights in float32: every greedy token is the most likely one, up to what
rounding moves logits by.
"""

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
from pagoda.worker.device_steps import Kind
from tests.e2e.harness import Answer, engine, generate
from tests.gpu.harness import TINY
from tests.models import tiny

HAS_GPU = torch.cuda.is_available() and not triton.knobs.runtime.interpret
LAYERS, TOKENS = (4, 24) if HAS_GPU else (1, 2)
VOCAB = tiny.SHAPE["vocab_size"]
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_tokens=TOKENS, ignore_eos=True)

pytestmark = pytest.mark.skipif(
    not HAS_GPU and not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=0, and there is no GPU"
)


def device_engine(path: Path, **kwargs: Any) -> LocalEngine:
    defaults: dict[str, Any] = {"device": "cuda" if HAS_GPU else "null", "dtype": "bfloat16"}
    return engine(path, **{**TINY, **defaults, **kwargs})


def prompts(count: int) -> dict[str, list[int]]:
    rng = np.random.default_rng(count)
    return {f"r{i}": rng.integers(3, VOCAB, int(rng.integers(2, 40 if HAS_GPU else 9))).tolist() for i in range(count)}


@pytest.fixture(scope="module", params=["llama", "qwen3"] if HAS_GPU else ["qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint, and transformers' model of it with its weights rounded to bfloat16 and computing in float32."""
    path, model = tiny.make(request.param, tmp_path_factory.mktemp("device"), num_hidden_layers=LAYERS)
    return path, model.to(torch.bfloat16).float()


def check_greedy(model: Any, prompt: list[int], answer: Answer) -> None:
    ids = prompt + answer.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    spread = float(logits.std())
    for i, token in enumerate(answer.token_ids):
        row = logits[len(prompt) - 1 + i]
        assert float(row.max() - row[token]) <= 0.15 * spread, f"token {i} of the answer"


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_greedy_tokens_are_those_of_transformers(pair: tuple[Path, Any], eager: bool) -> None:
    path, model = pair
    asked = prompts(6 if HAS_GPU else 2)
    local = device_engine(path, enforce_eager=eager)
    assert local.ledger.mode == ("op by op" if eager else "graphs")
    for name, answer in generate(local, asked, GREEDY).items():
        assert len(answer.token_ids) == TOKENS
        check_greedy(model, asked[name], answer)


def test_batch_invariance(pair: tuple[Path, Any]) -> None:
    """With --batch-invariant neighbours, chunks, graphs and overlap do not change a bit of an answer, log-probabilities included."""
    path, _ = pair
    ids = prompts(1)["r0"]
    asked = {"ours": ids, **(prompts(7) if HAS_GPU else prompts(2))}
    params = {name: DRAWN.clone(logprobs=2) if name == "ours" else DRAWN for name in asked}
    alone = generate(device_engine(path, batch_invariant=True), {"ours": ids}, params["ours"])["ours"]
    for options in ({}, {"enforce_eager": True, "max_num_batched_tokens": 7, "async_scheduling": False}):
        found = generate(device_engine(path, batch_invariant=True, max_num_seqs=4, **options), asked, params)["ours"]
        assert found.token_ids == alone.token_ids and found.logprobs == alone.logprobs


def test_overlap_changes_nothing(pair: tuple[Path, Any]) -> None:
    path, _ = pair
    if not HAS_GPU:
        pytest.skip("`test_null_device` has it for the null device")
    asked = prompts(4)
    found = [generate(device_engine(path, async_scheduling=on, batch_invariant=True), asked, DRAWN) for on in (True, False)]
    assert {k: v.token_ids for k, v in found[0].items()} == {k: v.token_ids for k, v in found[1].items()}


@pytest.mark.skipif(not HAS_GPU, reason="`test_device_steps` has it for the null device")
def test_what_is_drawn_on_the_device_is_what_the_host_would_draw(pair: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties, biases, bans, log-probabilities and masks: from the same logits, two steps in flight against one and the host."""
    from tests.gpu.test_null_device import Compiler

    fields: dict[str, dict[str, Any]] = {
        "repeats": {"repetition_penalty": 1.8, "frequency_penalty": 1.5, "presence_penalty": 0.5, "logprobs": 2},
        "biased": {"logit_bias": {7: 30.0, 9: 29.5, 8: -100.0}, "bad_words_token_ids": [[7], [11]], "logprobs": 0},
        "allowed": {"allowed_token_ids": [5, 40, 90, 130], "frequency_penalty": 2.0}, "lasting": {"min_tokens": 8, "stop_token_ids": [9], "logit_bias": {9: 60.0}},
        "scores": {"logprobs": 7, "logprobs_mode": "raw_logits", "temperature": 0.0}, "masked": {}, "plain": {},
    }  # fmt: skip
    ids = prompts(7)

    def run(local: LocalEngine) -> dict[str, list[Any]]:
        local.core._grammars = Grammars(Compiler(), time.monotonic)
        for i, (name, more) in enumerate(fields.items()):
            params = DRAWN.clone(**{"seed": i, "max_tokens": 12, **more})
            request = GenerateRequest(request_id=name, prompt_token_ids=ids[f"r{i}"], params=params, grammar="50" if name == "masked" else None)
            local.core.add(request)
        found: dict[str, list[Any]] = {name: [] for name in fields}
        while local.core.has_work():
            for out in local.core.step():
                assert out.error is None, out.error
                found[out.request_id] += [*out.new_token_ids, *((e.token_ids, e.rank) for e in out.logprobs or [])]
        return found

    mine = run(device_engine(pair[0], batch_invariant=True))
    monkeypatch.setattr(device_steps, "kind_of", lambda params, chain, is_guided: Kind.HOST if is_guided or chain or params.logprobs is not None else Kind.PLAIN)
    assert mine == run(device_engine(pair[0], batch_invariant=True, async_scheduling=False))
    assert mine["masked"] == list(range(50, 62))


@pytest.mark.parametrize("options", [{"kv_cache_dtype": "fp8"}, {"quantization": "int8"}, {"quantization": "int4"}, {"dtype": "float16"}], ids=str)
def test_narrow_formats_stay_near(pair: tuple[Path, Any], options: dict[str, Any]) -> None:
    """Prompt log-probabilities against transformers'; what a format costs is not judged here, only that it is the same model."""
    path, model = pair
    if not HAS_GPU and options.get("quantization") == "int4":
        pytest.skip("12 seconds in the interpreter; `tests/kernels_triton` has the format")
    ids = prompts(3)["r2"]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    local = device_engine(path, max_num_batched_tokens=64, **options)
    core = local.core
    core.add(GenerateRequest(request_id="a", prompt_token_ids=ids, params=params))
    found: list[float] = []
    while core.has_work():
        for out in core.step():
            assert out.error is None, out.error
            found += [entry.logprobs[0] for entry in (out.prompt_logprobs or []) if entry is not None]
    expected = tiny.reference_logprobs(model, ids)
    wanted = [float(expected[i, token]) for i, token in enumerate(ids[1:])]
    limit = 3.0 if options.get("quantization") == "int4" else 1.0
    assert np.abs(np.array(found) - wanted).mean() < limit and len(found) == len(wanted)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_memory_stays_within_its_share(pair: tuple[Path, Any]) -> None:
    local = device_engine(pair[0], num_gpu_blocks_override=None, kv_cache_memory_bytes=None, gpu_memory_utilization=0.5)
    free, total = torch.cuda.mem_get_info()
    assert free >= 0.45 * total
    generate(local, prompts(4), GREEDY)
    assert torch.cuda.mem_get_info()[0] >= 0.45 * total
    assert local.ledger.workspace_nbytes > 0 and local.ledger.graphs_nbytes >= 0
