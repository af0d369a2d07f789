"""Masks, penalties and log-probabilities of a whole batch, against the references and the CPU's own steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pagoda.base.types import SamplingParams
from pagoda.kernels import logits_ops, table
from pagoda.worker.logits.penalties import Penalties
from pagoda.worker.logits.step import RowContext
from pagoda.worker.sampler import top_logprobs
from tests.kernels.cases import normal

from .bridge import to_numpy, to_torch


def both(op: str, *args: np.ndarray, **kwargs: Any) -> list[np.ndarray]:
    """The op in place of its first operand -> what the reference and what the kernel made of it, or returned."""
    found = []
    for backend in ("reference", "cuda"):
        copies = [x.copy() if backend == "reference" else to_torch(x.copy(), torch.float32) for x in args]
        with table.backend(backend):
            result = getattr(logits_ops, op)(*copies, **kwargs)
        found.append([to_numpy(x) for x in result] if result is not None else to_numpy(copies[0]))
    return found


@pytest.mark.parametrize("vocab", [64, 75])
def test_bitmask(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    words = rng.integers(-(2**31), 2**31, (4, -(-vocab // 32))).astype(np.int32)
    words[0, 0] = -1
    expected, got = both("apply_bitmask", normal(rng, 5, vocab), words, np.array([3, -1, 0, 4], np.int32))
    np.testing.assert_array_equal(got, expected)
    assert np.isinf(got[[3, 0, 4]]).any() and not np.isinf(got[[1, 2]]).any()


@pytest.mark.parametrize("is_prompt", [True, False])
def test_tokens_are_counted(is_prompt: bool) -> None:
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 9, (4, 30)).astype(np.int32)
    seen[2, 6] = 4
    slots, tokens = np.array([0, 0, 3, -1, 2, 2, 0], np.int32), np.array([7, 8, 29, 2, 5, 6, 7], np.int64)
    expected, got = both("count_tokens", seen, slots, tokens, is_prompt=is_prompt)
    np.testing.assert_array_equal(got, expected)
    assert got[0, 7] == (seen[0, 7] | 1 if is_prompt else seen[0, 7] + 4)
    assert (got[1] == seen[1]).all(), "a negative slot is nobody's"


def test_penalties_agree_with_the_cpu() -> None:
    rng = np.random.default_rng(1)
    prompts, outputs = [rng.integers(0, 90, 20) for _ in range(3)], [rng.integers(0, 90, 30) for _ in range(3)]
    seen = torch.zeros(4, 90, dtype=torch.int32)
    for s, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for tokens, is_prompt in ((prompt, True), (output, False)):
            logits_ops.count_tokens(seen, torch.full((len(tokens),), s), to_torch(tokens, torch.float32), is_prompt=is_prompt)
    logits = normal(rng, 4, 90) * 4
    settings = [(1.3, 0.25, -0.5), (0.7, 0.0, 0.5), (1.0, 1.5, 0.0), (2.0, 2.0, 2.0)]
    slots = np.array([2, 0, 1, -1], np.int32)
    columns = [np.array([x[i] for x in settings], np.float32) for i in range(3)]
    expected = logits.copy()
    for row, slot in enumerate(slots[:3]):
        repetition, frequency, presence = settings[row]
        params = SamplingParams(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
        context = RowContext(params, np.concatenate([prompts[slot], outputs[slot]]), 20, ())
        Penalties().apply(expected[row], context)
    from_reference, got = both("penalize", logits, to_numpy(seen), slots, *columns)
    np.testing.assert_array_equal(got, from_reference)
    np.testing.assert_array_equal(got, expected)


def test_logprobs_and_ranks_agree_with_the_cpu() -> None:
    rng = np.random.default_rng(2)
    logits = np.round(normal(rng, 4, 75) * 4) / 4
    normalizer = np.log(np.exp(logits).sum(axis=1)).astype(np.float32)
    ids = rng.integers(0, 75, (4, 3))
    ids[1, 2] = -1
    (expected, expected_rank), (got, rank) = both("pick_logprobs", logits, normalizer, ids)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(rank, expected_rank)
    for row in range(4):
        of_cpu = top_logprobs(logits[row], int(ids[row, 0]), 0, float(normalizer[row]))
        assert rank[row] == of_cpu.rank
        assert got[row, 0] == pytest.approx(of_cpu.logprobs[0], abs=1e-6)
    assert got[1, 2] == -np.inf


def test_every_op_has_a_reference_and_a_kernel() -> None:
    for op in logits_ops.__all__:
        assert {"reference", "cuda"} <= set(table.devices_of(op))
