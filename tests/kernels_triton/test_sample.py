"""The sampler draws what the CPU's reference draws, row for row, from the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pagoda.kernels import ops
from pagoda.kernels.triton import sample as module
from tests.kernels.cases import CASES, Case, normal, sample_inputs

from .bridge import reference, to_numpy, to_torch
from .test_ops import rng_of


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few blocks, so that what is carried from block to block is tested on small vocabularies."""
    monkeypatch.setattr(module, "_BLOCK", 64)


def draw(columns: tuple[np.ndarray, ...]) -> np.ndarray:
    tensors = [to_torch(x.copy(), torch.float32) for x in columns]
    return to_numpy(ops.sample(*tensors))


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_reference(seed: int) -> None:
    columns = sample_inputs(np.random.default_rng(seed), (16, 16, 16, 12, 8)[seed], (5, 17, 64, 100, 190)[seed], spread=(2, 0.1, 1, 3, 6)[seed])
    np.testing.assert_array_equal(draw(columns), reference("sample", *columns))


def parameters(rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, first: int = 0) -> list[np.ndarray]:
    columns = [(temperature, np.float32), (top_k, np.int32), (top_p, np.float32), (min_p, np.float32), (2**64 - 77, np.uint64)]
    return [*(np.full(rows, value, kind) for value, kind in columns), np.arange(first, first + rows, dtype=np.int64)]


CUTS: list[dict[str, Any]] = [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.5}, {"top_p": 0.0}, {"min_p": 1.0}]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_ties_are_cut_by_id(cut: dict[str, Any]) -> None:
    """Nearly all logits are equal, zero of either sign among them: only the ids say which are kept."""
    rng = np.random.default_rng(3)
    logits = rng.choice(np.array([0.0, -0.0, -1.0, 1.0], np.float32), (2, 100), p=[0.6, 0.2, 0.17, 0.03])
    columns = (logits, *parameters(2, **cut))
    np.testing.assert_array_equal(draw(columns), reference("sample", *columns))
    columns = (np.zeros((2, 100), np.float32), *parameters(2, **cut))
    np.testing.assert_array_equal(draw(columns), reference("sample", *columns))


def test_extreme_rows() -> None:
    logits = np.zeros((9, 70), np.float32)
    logits[1, 69], logits[2, 3], logits[3, :] = np.nan, np.inf, -np.inf
    logits[4, :-1] = -np.inf
    logits[5] = np.linspace(-3e38, 3e38, 70)
    logits[6, :] = 1e-44  # below the least normal number
    logits[6, 5] = 2e-44
    logits[7, 0] = -np.nan
    logits[8] = -3.4e38
    for cut in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}):
        columns = (logits, *parameters(9, **cut))
        np.testing.assert_array_equal(draw(columns), reference("sample", *columns))


def test_16_bit_logits_are_widened() -> None:
    columns = list(sample_inputs(np.random.default_rng(1), 12, 90))
    columns[0] = to_numpy(to_torch(columns[0], torch.float32).bfloat16())
    tensors = [to_torch(x.copy(), torch.float32) for x in columns]
    tensors[0] = tensors[0].bfloat16()
    np.testing.assert_array_equal(to_numpy(ops.sample(*tensors)), reference("sample", *columns))


@pytest.mark.parametrize("case", [c for c in CASES if c.op in ("row_logsumexp", "row_is_finite")], ids=str)
def test_rows_are_summed_and_checked(case: Case) -> None:
    args, _ = case.make(rng_of(case))
    expected = reference(case.op, *args)
    got = to_numpy(getattr(ops, case.op)(*(to_torch(x, torch.float32) for x in args)))
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_logsumexp_of_dead_rows() -> None:
    x = normal(np.random.default_rng(0), 4, 80)
    x[0], x[1, 4], x[2, 70] = -np.inf, np.inf, np.nan
    got = to_numpy(ops.row_logsumexp(to_torch(x, torch.float32)))
    assert got[0] == -np.inf and got[1] == np.inf and np.isnan(got[2]) and np.isfinite(got[3])
