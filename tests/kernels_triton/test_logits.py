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
        found.append([to_numpy(x) for x in result] if isinstance(result, tuple) else to_numpy(copies[0] if result is None else result))
    return found


@pytest.mark.parametrize("vocab", [64, 75])
def test_bitmask(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    words = rng.integers(-(2**31), 2**31, (4, -(-vocab // 32))).astype(np.int32)
    words[0, 0] = -1
    expected, got = both("apply_bitmask", normal(rng, 5, vocab), words, np.array([3, -1, 0, 4], np.int32))
    np.testing.assert_array_equal(got, expected)
    assert np.isinf(got[[3, 0, 4]]).any() and not np.isinf(got[[1, 2]]).any()


@pytest.mark.parametrize("longest", [9, 1030])
def test_tokens_are_counted(longest: int) -> None:
    rng = np.random.default_rng(longest)
    seen = rng.integers(0, 9, (4, 30)).astype(np.int32)
    tokens = rng.integers(0, 30, (4, 1100)).astype(np.int32)
    slots, prompts = np.array([2, 0, -1, 3], np.int32), np.array([5, 0, 9, 2000], np.int32)
    begins, ends = np.array([3, 0, 0, 7], np.int32), np.array([3 + longest, 1, longest, 12], np.int32)
    expected, got = both("count_tokens", seen, tokens, slots, begins, ends, prompts, longest=longest)
    np.testing.assert_array_equal(got, expected)
    assert (got[1] == seen[1]).all(), "a negative slot is nobody's"
    assert (got[3] >> 1 == seen[3] >> 1).all() and got.sum() > seen.sum()


def test_rows_are_copied_where_they_are_wanted() -> None:
    """Between types, from any row to any place; a negative one is passed over."""
    rng = np.random.default_rng(3)
    source, target = normal(rng, 4, 1100), normal(rng, 5, 1100)
    rows, places = np.array([3, -1, 0], np.int32), np.array([4, 1, 2], np.int32)
    wide = torch.zeros(3, 1100)
    logits_ops.copy_rows(to_torch(source, torch.bfloat16), to_torch(rows, torch.float32), wide)
    np.testing.assert_array_equal(to_numpy(wide)[[0, 2]], to_numpy(to_torch(source[[3, 0]], torch.bfloat16)))
    out = to_torch(target, torch.bfloat16)
    logits_ops.copy_rows(wide, to_torch(np.array([0, -1, 2], np.int32), torch.float32), out, to_torch(places, torch.float32))
    np.testing.assert_array_equal(to_numpy(out)[[4, 2]], to_numpy(to_torch(source[[3, 0]], torch.bfloat16)))
    np.testing.assert_array_equal(to_numpy(out)[[0, 1, 3]], to_numpy(to_torch(target[[0, 1, 3]], torch.bfloat16)))


def test_numbers_are_added_at_single_places() -> None:
    rng = np.random.default_rng(4)
    rows, ids = rng.integers(-1, 3, 1500).astype(np.int32), rng.permutation(1500).astype(np.int32)
    values = normal(rng, 1, 1500)[0]
    values[::7] = -np.inf
    rows, ids, values = (np.concatenate([x, x[:20]]) for x in (rows, ids, values))
    values[-20:] = -np.inf  # a token may be banned and biased
    expected, got = both("add_at", normal(rng, 3, 1500), rows, ids, values)
    np.testing.assert_array_equal(got, expected)


def test_ids_are_put_in_their_rows() -> None:
    rows, found = np.array([4, 1, -1, 0], np.int32), np.array([40, 10, 20, 30], np.int32)
    expected, got = both("put_ids", np.arange(6, dtype=np.int32) + 90, rows, found, np.array([1, 1, 1, 0], np.int8))
    np.testing.assert_array_equal(got, expected)
    assert got.tolist() == [-1, 10, 92, 93, 40, 95]


def test_the_largest_come_in_one_order() -> None:
    """Lower ids first where logits are equal, zeros of both signs among them, as the CPU's sampler lists them."""
    rng = np.random.default_rng(5)
    logits = np.round(normal(rng, 40, 75) * 2) / 2
    logits[3] = 0.0
    logits[3, ::2] = -0.0
    logits[4, 9:] = -np.inf
    expected, got = both("top_tokens", logits, count=20)
    np.testing.assert_array_equal(got, expected)
    for row in range(40):
        assert top_logprobs(logits[row], 5, 20, 0.0).token_ids[1:] == got[row].tolist()


def test_penalties_agree_with_the_cpu() -> None:
    rng = np.random.default_rng(1)
    prompts, outputs = [rng.integers(0, 90, 20) for _ in range(3)], [rng.integers(0, 90, 30) for _ in range(3)]
    seen, table = torch.zeros(4, 90, dtype=torch.int32), to_torch(np.concatenate([prompts, outputs], axis=1).astype(np.int32), torch.float32)
    for begin, end in ((0, 27), (27, 50)):  # as steps do
        columns = [torch.full((3,), x, dtype=torch.int32) for x in (begin, end, 20)]
        logits_ops.count_tokens(seen, table, torch.arange(3, dtype=torch.int32), *columns, longest=end - begin)
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
    shuffled = logits[[2, 0, 3, 1]]
    (expected, expected_rank), (got, rank) = both("pick_logprobs", shuffled, np.array([1, 3, 0, 2], np.int32), normalizer, ids)
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
