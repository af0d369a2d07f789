"""Pages of the cache: what is written can be read back, copied and carried elsewhere as bytes."""

from __future__ import annotations

import resource

import numpy as np
import pytest

from pagoda.kernels import ops
from pagoda.kernels.kv import (
    DTYPES,
    KvPlane,
    allocate_kv_plane,
    bytes_per_block,
    copy_blocks,
    read_blocks,
    read_tokens,
    write_blocks,
)

from .cases import bf16, normal


def plane(dtype: str = "bfloat16", block_size: int = 32, num_blocks: int = 6) -> KvPlane:
    return allocate_kv_plane(dtype=dtype, block_size=block_size, num_blocks=num_blocks, num_kv_heads=2, head_dim=12)


def fill(cache: KvPlane, tokens: int, table: list[int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    k, v = normal(rng, tokens, 24), normal(rng, tokens, 24)
    at = np.arange(tokens)
    ops.kv_write(k, v, cache, np.array(table)[at // cache.block_size] * cache.block_size + at % cache.block_size)
    return k.reshape(-1, 2, 12), v.reshape(-1, 2, 12)


def eight_bits(x_THD: np.ndarray) -> np.ndarray:
    step = np.abs(x_THD).max(axis=2, keepdims=True) / np.float32(127)
    return np.rint(x_THD / step) * step


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_come_back(dtype: str) -> None:
    cache = plane(dtype)
    k, v = fill(cache, 70, [4, 0, 2])
    got_k, got_v = read_tokens(cache, np.array([4, 0, 2]), 70)
    rounded = {"float32": lambda x: x, "bfloat16": bf16, "int8": eight_bits}[dtype]
    np.testing.assert_array_equal(got_k, rounded(k))
    np.testing.assert_array_equal(got_v, rounded(v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_can_be_copied_and_carried(dtype: str) -> None:
    cache, other = plane(dtype), plane(dtype)
    fill(cache, 64, [1, 3])
    copy_blocks(cache, np.array([1, 3]), np.array([3, 5]))  # the source of one is the target of the other
    before = read_tokens(cache, np.array([3, 5]), 64)
    write_blocks(other, np.array([0, 2]), read_blocks(cache, np.array([3, 5])))
    for a, b in zip(before, read_tokens(other, np.array([0, 2]), 64)):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"take .* bytes"):
        write_blocks(other, np.array([0]), b"123")


def test_int8_rows_of_any_size(isa: str) -> None:
    """Zeros, tiny rows and huge ones have a scale; what is not finite has none, and shows in the answer."""
    cache = plane("int8")
    x = normal(np.random.default_rng(3), 6, 24)
    x[0], x[1], x[2] = 0, x[1] * 1e-35, x[2] * 1e30
    x[3, 5], x[4, 17] = np.nan, -np.inf
    ops.kv_write(x, x, cache, np.arange(6))
    for got in read_tokens(cache, np.array([0]), 6):
        heads = x.reshape(6, 2, 12)
        np.testing.assert_array_equal(got[:2], 0)
        for t in (2, 5):
            np.testing.assert_allclose(got[t], heads[t], atol=0.51 * np.abs(heads[t]).max() / 127)
        assert np.isnan(got[3, 0]).all() and np.isfinite(got[3, 1]).all()
        assert np.isnan(got[4, 1]).all() and np.isfinite(got[4, 0]).all()


def test_bytes_per_block_is_what_is_allocated() -> None:
    for dtype in DTYPES:
        one = bytes_per_block(dtype=dtype, block_size=32, num_kv_heads=2, head_dim=12)
        assert one * 6 == plane(dtype).nbytes


def test_pages_cost_nothing_before_they_are_written() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = plane(num_blocks=200_000)
    assert cache.nbytes > 300e6
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 50e6


def test_impossible_sizes_are_refused() -> None:
    sizes = {"dtype": "float32", "block_size": 16, "num_blocks": 1, "num_kv_heads": 1, "head_dim": 8}
    for name, value in (("dtype", "int3"), ("block_size", 24), ("head_dim", 7)):
        with pytest.raises(ValueError, match=f"`{name}`"):
            allocate_kv_plane(**(sizes | {name: value}))  # type: ignore[arg-type]
