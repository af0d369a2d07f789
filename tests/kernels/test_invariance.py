"""Batch invariance, bit for bit: a row's result does not depend on its neighbours, the chunks or the threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pagoda.kernels import ops
from pagoda.kernels.cpu import library
from pagoda.kernels.kv import DTYPES, allocate_kv_plane
from pagoda.kernels.weight import FORMATS

from .cases import fill_with_nan, filled_cache, normal, rope_table, sample_inputs, weight, width_for

BATCHES = (1, 2, 5, 9, 33, 65)


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest, isa: str) -> Iterator[int]:
    library.default().set_threads(request.param)
    yield request.param


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("k", "n"), [(64, 160), (576, 50)])
def test_linear(format: str, k: int, n: int, threads: int) -> None:
    rng, k = np.random.default_rng(3), width_for(format, k)
    w, bias, x = weight(rng, format, n, k), normal(rng, n), normal(rng, 65, k)
    residual = normal(rng, 65, n)
    library.default().set_threads(1)
    alone = np.concatenate([ops.linear(x[r : r + 1], w, bias, residual=residual[r : r + 1]) for r in range(65)])
    library.default().set_threads(threads)
    for rows in BATCHES:
        np.testing.assert_array_equal(ops.linear(x[:rows], w, bias, residual=residual[:rows]), alone[:rows])
    np.testing.assert_array_equal(ops.linear(x[20:40], w, bias, residual=residual[20:40]), alone[20:40])


@pytest.mark.parametrize("format", FORMATS)
def test_linear_of_more_rows_than_a_cache_keeps(format: str, isa: str) -> None:
    """130 rows of 1,536 values are multiplied in parts where the second cache is small, the last part a short one."""
    rng = np.random.default_rng(7)
    w, x = weight(rng, format, 50, 1536), normal(rng, 130, 1536)
    pieces = np.concatenate([ops.linear(x[r : r + 10], w) for r in range(0, 130, 10)])
    np.testing.assert_array_equal(ops.linear(x, w), pieces)


def test_row_ops(threads: int) -> None:
    rng = np.random.default_rng(4)
    x, g, at, angles = normal(rng, 65, 96), normal(rng, 24), rng.integers(0, 99, 65), rope_table(100, 24)
    for f in (
        lambda s: ops.rms_norm(x[s], g, eps=1e-6),
        lambda s: ops.rope(x[s], at[s], angles, head_dim=24),
        lambda s: ops.act_and_mul(x[s], "silu"),
        lambda s: ops.soft_cap(x[s], 3.0),
        lambda s: ops.row_logsumexp(x[s]),
    ):
        whole = f(slice(0, 65))
        for rows in BATCHES:
            np.testing.assert_array_equal(f(slice(0, rows)), whole[:rows])
        np.testing.assert_array_equal(np.concatenate([f(slice(r, r + 1)) for r in range(65)]), whole)


def test_sample(threads: int) -> None:
    columns = sample_inputs(np.random.default_rng(5), 65, 700)
    whole = ops.sample(*columns)
    for rows in BATCHES:
        np.testing.assert_array_equal(ops.sample(*(c[:rows] for c in columns)), whole[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (37, 0.0), (50, 8.0)])
def test_attention_in_any_chunks(dtype: str, window: int, cap: float, threads: int) -> None:
    heads, group, dim, length = 2, 3, 24, 150
    rng = np.random.default_rng(6)
    q, k, v = normal(rng, length, heads * group * dim), normal(rng, length, heads * dim), normal(rng, length, heads * dim)

    def decode(chunks: list[int], block_size: int, neighbours: int) -> np.ndarray:
        """The sequence computed in these chunks, among neighbours with keys of their own; garbage in unused pages."""
        cache = allocate_kv_plane(dtype=dtype, block_size=block_size, num_blocks=40, num_kv_heads=heads, head_dim=dim)
        fill_with_nan(cache)
        pages = np.random.default_rng(block_size).permutation(40)[: -(-length // block_size)].astype(np.int32)
        table = np.zeros((1 + neighbours, len(pages)), np.int32)
        table[-1] = pages
        spare = np.setdiff1d(np.arange(40), pages)
        out, done = [], 0
        for chunk in chunks:
            at = np.arange(done, done + chunk)
            slots = pages[at // block_size].astype(np.int64) * block_size + at % block_size
            for i in range(neighbours):  # one key and one query each
                table[i, 0] = spare[i]
            others = normal(np.random.default_rng(chunk), neighbours, heads * group * dim)
            rows = np.concatenate([others, q[at]])
            keys = np.concatenate([others[:, : heads * dim], k[at]])
            values = np.concatenate([others[:, : heads * dim], v[at]])
            all_slots = np.concatenate([spare[:neighbours] * block_size, slots])
            ops.kv_write(keys, values, cache, all_slots)
            starts = np.cumsum([0, *[1] * neighbours, chunk]).astype(np.int32)
            lens = np.array([*[1] * neighbours, done + chunk], np.int32)
            y = ops.attention(rows, cache, table, starts, lens, scale=0.2, head_dim=dim, window=window, soft_cap=cap)
            out.append(y[neighbours:])
            done += chunk
        return np.concatenate(out)

    whole = decode([length], 16, 0)
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(decode([1] * length, 16, 0), whole)
    np.testing.assert_array_equal(decode([64, 17, 16, 53], 32, 3), whole)
    np.testing.assert_array_equal(decode([100] + [1] * 50, 64, 1), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 700])
def test_parts_of_a_long_context(dtype: str, window: int, threads: int) -> None:
    """One query shared out among threads gives the bits of the same query in a long chunk, and beside many others."""
    heads, group, dim, length = 2, 2, 16, 1700
    rng = np.random.default_rng(8)
    cache = allocate_kv_plane(dtype=dtype, block_size=16, num_blocks=120, num_kv_heads=heads, head_dim=dim)
    fill_with_nan(cache)
    table = np.random.default_rng(9).permutation(120)[:107].astype(np.int32)
    at = np.arange(length)
    ops.kv_write(normal(rng, length, heads * dim), normal(rng, length, heads * dim), cache, table[at // 16].astype(np.int64) * 16 + at % 16)
    q = normal(rng, length, heads * group * dim) * 6  # sharp: the largest score often changes

    def ask(chunks: list[tuple[int, int]]) -> np.ndarray:
        """Queries [first, stop) of the sequence, each chunk as a sequence of its own over the same pages."""
        rows = np.concatenate([q[a:z] for a, z in chunks])
        starts = np.cumsum([0, *(z - a for a, z in chunks)]).astype(np.int32)
        lens = np.array([z for _, z in chunks], np.int32)
        tables = np.tile(table, (len(chunks), 1))
        return ops.attention(rows, cache, tables, starts, lens, scale=0.25, head_dim=dim, window=window)

    picked = [3, 511, 512, 600, 1023, 1024, 1300, 1536, 1699]
    whole = ask([(0, length)])
    assert np.isfinite(whole).all()
    alone = np.concatenate([ask([(i, i + 1)]) for i in picked])
    np.testing.assert_array_equal(alone, whole[picked])
    np.testing.assert_array_equal(ask([(i, i + 1) for i in picked]), whole[picked])
    np.testing.assert_array_equal(ask([(1690, 1700), (500, 530)]), np.concatenate([whole[1690:1700], whole[500:530]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 40])
def test_heads_taken_together(dtype: str, window: int, threads: int) -> None:
    """Many sequences, whose heads one task takes together, give the bits of each one alone, whose heads are tasks of their own."""
    heads, group, dim, seqs = 3, 2, 32, 26
    rng = np.random.default_rng(12)
    lens = np.array([1, 1100, *rng.integers(1, 210, seqs - 2)], np.int32)
    cache, table = filled_cache(rng, dtype, block_size=16, heads=heads, dim=dim, lens=list(lens))
    q = normal(rng, seqs, heads * group * dim)

    def ask(chosen: slice) -> np.ndarray:
        count = len(lens[chosen])
        starts = np.arange(count + 1, dtype=np.int32)
        return ops.attention(q[chosen], cache, table[chosen], starts, lens[chosen], scale=0.2, head_dim=dim, window=window)

    whole = ask(slice(0, seqs))
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(np.concatenate([ask(slice(i, i + 1)) for i in range(seqs)]), whole)
    np.testing.assert_array_equal(ask(slice(3, 7)), whole[3:7])
