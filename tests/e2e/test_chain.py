"""The sampler chain on a whole engine: the same tokens alone, in a crowd, in a pool so small that everybody is preempted; and what
banned strings and beams promise, on the default model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagoda.api.llm import LLM
from pagoda.base.types import SamplingParams
from tests.e2e.harness import engine, generate
from tests.models import tiny

pytest.importorskip("torch", reason="makes the tiny model; `make setup` installs it")

KINDS: dict[str, dict[str, Any]] = {
    "typical": {"typical_p": 0.6},
    "sigma": {"top_n_sigma": 1.0},
    "dynamic": {"dynatemp_range": 0.5},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.001, "top_p": 0.95},
    "dry": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "temperature": 0.3},
    "mirostat": {"mirostat_mode": 2, "mirostat_tau": 3.0},
    "processed": {"top_k": 5, "logprobs_mode": "processed_logprobs"},
    "plain": {},
}


def requests(vocab: int) -> tuple[dict[str, list[int]], dict[str, SamplingParams]]:
    rng = np.random.default_rng(3)
    prompts = {name: rng.integers(3, vocab, 20).tolist() for name in KINDS}
    base = {"temperature": 1.0, "seed": 5, "max_tokens": 30, "logprobs": 2, "ignore_eos": True}
    return prompts, {name: SamplingParams(**{**base, **kind}) for name, kind in KINDS.items()}


def test_alone_together_and_preempted(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny.make("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=512)[0]
    local = engine(model)
    prompts, params = requests(local.facts.vocab_size)
    alone = {name: generate(local, {name: prompts[name]}, params[name])[name] for name in prompts}
    together = generate(local, prompts, params)
    small = engine(model, num_gpu_blocks_override=14, max_model_len=64, max_num_batched_tokens=32, max_num_seqs=8)
    squeezed = generate(small, prompts, params)
    assert squeezed["mirostat"].num_preemptions + squeezed["xtc"].num_preemptions > 0, "the pool was meant to run out"
    for name in prompts:
        assert together[name].token_ids == alone[name].token_ids == squeezed[name].token_ids, name
        assert together[name].logprobs == alone[name].logprobs == squeezed[name].logprobs, name
    assert len({tuple(answer.token_ids) for answer in alone.values()}) >= len(KINDS) - 1, "each kind is another distribution"


@pytest.fixture(scope="module")
def llm(default_model: Path) -> Iterator[LLM]:
    made = LLM(str(default_model), max_model_len=512, kv_cache_memory_bytes=64 << 20)
    yield made
    made.close()


def test_banned_strings_never_appear(llm: LLM) -> None:
    text = "The capital of France is"
    params = SamplingParams(temperature=0, max_tokens=24)
    free = llm.generate(text, params, use_tqdm=False)[0].outputs[0].text
    banned = [word for word in dict.fromkeys(free.split()) if len(word) > 2][:3]
    assert banned
    found = llm.generate(text, params.clone(banned_strings=banned), use_tqdm=False)[0].outputs[0].text
    assert found and not any(word in found for word in banned)


def test_one_beam_is_greedy_and_more_are_never_worse(llm: LLM) -> None:
    text = "Once upon a time there was a"
    greedy = llm.generate(text, SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True), use_tqdm=False)[0].outputs[0]
    one, *_ = llm.beam_search(text, beam_width=1, max_tokens=12, ignore_eos=True, length_penalty=0.0)[0].outputs
    assert one.token_ids == greedy.token_ids and one.text == greedy.text
    assert one.cumulative_logprob == pytest.approx(greedy.cumulative_logprob, abs=1e-6)
    beams = llm.beam_search(text, beam_width=4, max_tokens=12, ignore_eos=True, length_penalty=0.0)[0].outputs
    logprobs = [beam.cumulative_logprob or 0.0 for beam in beams]
    assert logprobs == sorted(logprobs, reverse=True) and logprobs[0] >= (greedy.cumulative_logprob or 0.0)
    assert len({tuple(beam.token_ids) for beam in beams}) == 4
