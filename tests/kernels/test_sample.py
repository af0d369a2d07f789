"""The sampler: known random numbers, exact agreement with the reference, and the distribution it should draw from."""

from __future__ import annotations

import numpy as np
import pytest

from pagoda.kernels import ops
from pagoda.kernels.reference.sample import philox_uniform

from .cases import normal


def draw(logits: np.ndarray, n: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """n samples of one row, at positions 0, 1, 2, ..."""
    rows = np.broadcast_to(np.asarray(logits, np.float32), (n, len(logits)))
    return ops.sample(
        np.ascontiguousarray(rows),
        np.full(n, temperature, np.float32),
        np.full(n, top_k, np.int32),
        np.full(n, top_p, np.float32),
        np.full(n, min_p, np.float32),
        np.full(n, 1234, np.uint64),
        np.arange(n, dtype=np.int64),
    )


def test_philox_known_answers() -> None:
    """The first two words of the published vectors of Philox4x32-10 for an all-zero and an all-one counter and key."""
    assert philox_uniform(0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    assert 0 <= philox_uniform(2**64 - 1, -1) < 1
    assert philox_uniform(2**64 - 1, -1) == philox_uniform(2**64 - 1, 2**64 - 1)


def test_distribution_is_the_softmax(isa: str) -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    counts = np.bincount(draw(logits, 20_000), minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.5, 0.25, 0.15, 0.1], atol=0.015)


def test_each_cut_keeps_what_it_says(isa: str) -> None:
    p = np.array([0.1, 0.4, 0.2, 0.25, 0.05])
    logits = np.log(p)
    assert set(draw(logits, 500, top_k=2)) == {1, 3}
    assert set(draw(logits, 500, top_p=0.41)) == {1, 3}
    assert set(draw(logits, 500, top_p=0.0)) == {1}
    assert set(draw(logits, 500, min_p=0.45)) == {1, 2, 3}
    assert set(draw(logits, 500, top_k=3, top_p=0.7)) == {1, 3}  # of 0.85 that are left, 0.65 reach 0.7
    assert set(draw(logits, 500, temperature=0.0)) == {1}


def test_ties_go_to_the_lowest_ids(isa: str) -> None:
    logits = np.zeros(300, np.float32)
    assert set(draw(logits, 400, top_k=3)) == {0, 1, 2}
    assert set(draw(logits, 10, temperature=0.0)) == {0}


def test_masked_tokens_are_never_drawn(isa: str) -> None:
    logits = normal(np.random.default_rng(0), 1, 200)[0]
    logits[::2] = -np.inf
    assert (draw(logits, 500, temperature=3.0) % 2 == 1).all()
    logits[:] = -np.inf
    assert (draw(logits, 3) == -1).all(), "nothing can be drawn"
    for bad in (np.nan, np.inf):
        logits[:] = 0
        logits[-1] = bad
        assert (draw(logits, 3) == -1).all() and (draw(logits, 3, temperature=0.0) == -1).all()


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = normal(np.random.default_rng(1), 1, 1000)[0] * 0.1
    first, again = draw(logits, 50), draw(logits, 50)
    np.testing.assert_array_equal(first, again)
    assert len(set(first)) > 40


@pytest.mark.parametrize("seed", range(4))
def test_native_agrees_with_reference_on_many_rows(seed: int, isa: str) -> None:
    from pagoda.kernels import table

    from .cases import sample_inputs

    columns = sample_inputs(np.random.default_rng(seed), 150, (17, 64, 129, 2000)[seed], spread=(0.1, 1, 3, 6)[seed])
    got = ops.sample(*columns)
    with table.backend("reference"):
        np.testing.assert_array_equal(got, ops.sample(*columns))
