"""Batch invariance, bit for bit, on logprobs: whatever the neighbours, the budget, the cache, preemption, threads, instruction
set and weight format, a request gets the same numbers. On the default model and on a tiny Gemma 3 (windows, two rotary
bases, norms on both sides)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagoda.base.types import SamplingParams
from pagoda.kernels import gguf_blocks
from pagoda.kernels.cpu import library
from tests.e2e.harness import Answer, engine, generate
from tests.models import tiny

pytest.importorskip("torch", reason="makes the tiny Gemma 3; `make setup` installs it")

BATCHES = (1, 2, 5, 9, 33, 65)
PARAMS = SamplingParams(temperature=0.8, seed=11, max_tokens=10, logprobs=5, ignore_eos=True)
NEIGHBOUR = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module", params=["default", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "default":
        return request.getfixturevalue("default_model")  # type: ignore[no-any-return]
    return tiny.make("gemma3", tmp_path_factory.mktemp("gemma3"), max_position_embeddings=512)[0]


@pytest.fixture(autouse=True)
def restore_library() -> Iterator[None]:
    lib = library.default()
    isa, threads = lib.isa, lib.num_threads
    yield
    lib.set_isa(isa)
    lib.set_threads(threads)


def prompt(vocab: int, length: int = 45) -> list[int]:
    return np.random.default_rng(5).integers(3, min(vocab, 5000), length).tolist()


def among(size: int, vocab: int) -> dict[str, list[int]]:
    """Our prompt somewhere among size - 1 others of all lengths."""
    rng = np.random.default_rng(size)
    others = {f"other{i}": rng.integers(3, min(vocab, 5000), int(rng.integers(1, 60))).tolist() for i in range(size - 1)}
    items = [*others.items()]
    items.insert(size // 2, ("ours", prompt(vocab)))
    return dict(items)


def ask(model: Path, size: int = 1, **kwargs: Any) -> Answer:
    local = engine(model, **kwargs)
    prompts = among(size, local.facts.vocab_size)
    return generate(local, prompts, {name: PARAMS if name == "ours" else NEIGHBOUR for name in prompts})["ours"]


def same(found: Answer, expected: Answer) -> None:
    assert found.token_ids == expected.token_ids
    assert found.logprobs == expected.logprobs  # floats, compared exactly


def test_batches_budgets_threads(model: Path) -> None:
    expected = ask(model)
    assert len(expected.token_ids) == PARAMS.max_tokens
    for size in BATCHES[1:]:
        same(ask(model, size), expected)
    for budget in (16, 17, 512):
        same(ask(model, 5, max_num_batched_tokens=budget, max_num_seqs=16), expected)
    for threads in (1, 2):
        same(ask(model, 9, num_threads=threads), expected)
    same(ask(model, 3, enforce_eager=True), expected)


def test_steps_that_overlap(model: Path) -> None:
    """Tokens drawn before the host has seen those before them, beside rows that have to wait for it, and ends that come as a surprise."""
    plain = engine(model, async_scheduling=False)
    assert plain.executor.runner.num_steps == 1 and engine(model).executor.runner.num_steps == 2
    prompts = among(17, plain.facts.vocab_size)
    kinds = [dict(), dict(temperature=0.0), dict(top_k=20, seed=3), dict(logprobs=2), dict(presence_penalty=0.7), dict(min_tokens=1)]
    lengths = (1, 2, 7, 30, 31)
    params = {
        name: SamplingParams(**{"temperature": 0.9, "seed": i, "max_tokens": lengths[i % 5], "ignore_eos": True, **(kinds[i % 6] if i > 9 else {})})
        for i, name in enumerate(prompts)
    }
    expected = generate(plain, prompts, params)
    stops = {name: params[name].clone(stop_token_ids=expected[name].token_ids[3:4]) for name in prompts}
    for chosen in (params, stops):
        for options in ({}, {"max_num_batched_tokens": 16, "max_num_seqs": 5}, {"num_threads": 1}, {"kv_cache_memory_bytes": 13 << 20}):
            found = generate(engine(model, **options), prompts, chosen)
            for name in prompts:
                wanted = expected[name].token_ids
                if chosen is stops and len(wanted) > 3:
                    wanted = wanted[: wanted.index(wanted[3]) + 1]
                assert found[name].token_ids == wanted, (name, options)


def test_int8_cache(model: Path) -> None:
    """Neighbours, chunks, threads and prefix hits; as many tokens as bfloat16 holds in not much more than half the bytes."""
    int8: dict[str, Any] = {"kv_cache_dtype": "int8"}
    expected = ask(model, enable_prefix_caching=False, **int8)
    for size, options in ((9, {}), (5, {"max_num_batched_tokens": 17, "max_num_seqs": 16}), (3, {"num_threads": 1}), (3, {"enforce_eager": True})):
        same(ask(model, size, **options, **int8), expected)
    local = engine(model, **int8)
    ids = prompt(local.facts.vocab_size)
    generate(local, {"first": ids}, PARAMS)
    hit = generate(local, {"ours": ids, "other": [*ids, 7]}, {"ours": PARAMS, "other": NEIGHBOUR})["ours"]
    assert hit.num_cached_tokens >= 32
    same(hit, expected)
    plain = engine(model, kv_cache_dtype="bfloat16")
    bytes_per_block = [e.ledger.kv_nbytes / e.ledger.num_blocks for e in (local, plain)]
    dim = local.facts.head_dim
    assert bytes_per_block[0] / bytes_per_block[1] == (dim + 4) / (2 * dim)


def test_prefix_hit_and_miss(model: Path) -> None:
    expected = ask(model, enable_prefix_caching=False)
    local = engine(model)
    ids = prompt(local.facts.vocab_size)
    miss = generate(local, {"a": ids}, PARAMS)["a"]
    hit = generate(local, {"b": ids}, PARAMS)["b"]
    together = generate(local, {"c": [*ids, 7], "ours": ids, "d": [*ids, 8, 9]}, {"c": NEIGHBOUR, "ours": PARAMS, "d": NEIGHBOUR})
    assert miss.num_cached_tokens == 0 and hit.num_cached_tokens >= 32
    for found in (miss, hit, together["ours"]):
        same(found, expected)


def test_forced_preemption(model: Path) -> None:
    expected = ask(model)
    # 42 blocks are 14 prompts of the default model or 2 of Gemma 3's seven groups, and none of them can grow.
    local = engine(model, num_gpu_blocks_override=42, max_model_len=64, max_num_batched_tokens=64, max_num_seqs=32)
    count = 42 // (3 * len(local.facts.kv_groups)) + 2
    prompts = {f"p{i}": prompt(local.facts.vocab_size) if i == count - 1 else [i + 5] * 40 for i in range(count)}
    long = NEIGHBOUR.clone(max_tokens=24)
    ours = f"p{count - 1}"
    answers = generate(local, prompts, {name: PARAMS if name == ours else long for name in prompts})
    assert sum(a.num_preemptions for a in answers.values()) > 0, "the pool was meant to run out"
    same(answers[ours], expected)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"])
def test_every_instruction_set(model: Path, isa: str) -> None:
    if isa not in library.default().isas:
        pytest.skip(f"this CPU cannot run {isa}")
    library.default().set_isa(isa)
    expected = ask(model)
    same(ask(model, 9, max_num_batched_tokens=17, max_num_seqs=16, num_threads=1), expected)


K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
WEIGHTS = [
    ("float32", {"dtype": "float32"}),
    ("bfloat16", {"dtype": "bfloat16"}),
    *((kind, {"linear_activations": activations}) for kind in ("Q8_0", "Q4_0", "Q4_1", *K_QUANTS) for activations in ("int16", "int8")),
    *(("float32", {"quantization": wanted, "linear_activations": "int8"}) for wanted in ("int8", "int4")),
]


@pytest.mark.parametrize(("stored", "options"), WEIGHTS, ids=lambda v: v if isinstance(v, str) else "-".join(v.values()))
def test_every_weight_format(tmp_path: Path, stored: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    widths = {"hidden_size": 256, "intermediate_size": 256} if stored in K_QUANTS else {}
    path = tiny.make("gemma3", tmp_path, max_position_embeddings=512, **widths)[0]
    if stored.startswith("Q"):
        store_as(monkeypatch, stored)
    expected = ask(path, **options)
    for size in (5, 33):
        same(ask(path, size, max_num_batched_tokens=48, max_num_seqs=40, **options), expected)


def store_as(monkeypatch: pytest.MonkeyPatch, block_type: str) -> None:
    """The loader hands out block-quantized rows, as if the file held them; K-quants are random ones of small scale."""
    from pagoda.loader import weights
    from pagoda.loader.tensor import SourceTensor

    plain = weights._source

    def quantized(files: Any, name: str) -> SourceTensor:
        source = plain(files, name)
        values, num_bytes = gguf_blocks.BLOCK_SIZES[block_type]
        if len(source.shape) != 2 or source.shape[1] % values:
            return source
        if block_type not in K_QUANTS:
            rows = gguf_blocks.quantize(block_type, np.asarray(source.array, np.float32))
            return SourceTensor(name, rows, source.shape, block_type)
        blocks = np.random.default_rng(len(name)).integers(0, 256, (source.shape[0] * source.shape[1] // values, num_bytes), np.uint8)
        for at, step in {"Q6_K": ((208, 2e-5),)}.get(block_type, ((0, 2e-4), (2, 2e-3))):
            blocks[:, at : at + 2] = np.full((len(blocks), 1), step, np.float16).view(np.uint8)
        return SourceTensor(name, blocks.reshape(source.shape[0], -1), source.shape, block_type)

    monkeypatch.setattr(weights, "_source", quantized)
