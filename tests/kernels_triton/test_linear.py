"""Products and embeddings: every weight format, dense weights in fixed tiles, and the library's product."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pagoda.kernels import ops
from pagoda.kernels.triton import linear as module
from pagoda.kernels.triton.embedding import dequantize
from pagoda.kernels.triton.weight import DeviceWeight, pack_for_device
from pagoda.kernels.weight import BLOCK_FORMATS
from tests.kernels.cases import normal, width_for

from .bridge import DEVICE, assert_close, to_numpy, to_torch, weights
from .test_ops import dtypes

formats = pytest.mark.parametrize("format", ["bf16", *BLOCK_FORMATS])


def naive_linear(x: Any, weight: DeviceWeight, bias: Any = None, residual: Any = None) -> Any:
    """In the type of `x`: the weight dequantized to it, each sum rounded to it."""
    y = x @ dequantize(weight).t()
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


@dtypes
@formats
def test_products(format: str, dtype: Any) -> None:
    rng = np.random.default_rng(len(format))
    k = width_for(format, 160)
    host, weight = weights(rng, format, 70, k, dtype, fixed_tiles=format == "bf16")
    wide = to_torch(normal(rng, 19, k + 9), dtype)
    for x, extras in ((wide[:5, 4 : 4 + k], {}), (wide[:, 4 : 4 + k], {"bias_N": to_torch(normal(rng, 70), dtype)})):
        residual = to_torch(normal(rng, len(x), 70), dtype) if extras else None
        expected = to_numpy(x) @ host.dense.T
        if extras and residual is not None:
            expected = expected + to_numpy(extras["bias_N"]) + to_numpy(residual)
        naive = naive_linear(x, weight, extras.get("bias_N"), residual)
        out = torch.zeros(len(x), 75, dtype=dtype)[:, 2:72]
        got = ops.linear(x, weight, extras.get("bias_N"), residual=residual, out=out)
        assert got is out
        assert_close(got, expected, naive)


@dtypes
@pytest.mark.parametrize("k", [160, 2304])
@formats
def test_one_row(format: str, k: int, dtype: Any) -> None:
    """A kernel of its own: less than one tile of K and more than one, outputs that fill no tile."""
    rng = np.random.default_rng(k)
    k = width_for(format, k)
    host, weight = weights(rng, format, 37, k, dtype)
    x = to_torch(normal(rng, 1, k + 9), dtype)[:, 4 : 4 + k]
    bias, residual = to_torch(normal(rng, 37), dtype), to_torch(normal(rng, 1, 37), dtype)
    expected = to_numpy(x) @ host.dense.T
    assert_close(ops.linear(x, weight), expected, naive_linear(x, weight))
    out = torch.zeros(1, 50, dtype=dtype)[:, 3:40]
    got = ops.linear(x, weight, bias, residual=residual, out=out)
    assert got is out
    assert_close(got, expected + to_numpy(bias) + to_numpy(residual), naive_linear(x, weight, bias, residual))


@formats
def test_packing_keeps_the_stored_numbers(format: str) -> None:
    """float16 has digits to spare for 4 and 8 bits of these scales; the K formats are compared to its rounding."""
    host, weight = weights(np.random.default_rng(0), format, 20, width_for(format, 288), torch.float16)
    np.testing.assert_allclose(to_numpy(dequantize(weight)), host.dense, rtol=2**-8 if format == "bf16" else 2**-10, atol=1e-3)
    if format not in ("bf16", "f32"):
        bytes_per_value = weight.nbytes / (weight.data.numel() * (2 if weight.bits == 4 else 1))
        assert bytes_per_value <= weight.bits / 8 + (0.25 if format.endswith("_k") else 0.125)


@dtypes
@formats
def test_embedding(format: str, dtype: Any) -> None:
    rng = np.random.default_rng(1)
    host, table = weights(rng, format, 50, width_for(format, 96), dtype)
    ids = to_torch(rng.integers(0, 50, 9), torch.float32)
    expected = host.dense[to_numpy(ids)] * 1.5
    got = ops.embedding(ids, table, scale=1.5)
    assert got.dtype == dtype
    assert_close(got, expected, to_torch(host.dense, dtype)[ids] * torch.tensor(1.5, dtype=dtype))


def test_embedding_of_padding_reads_no_foreign_memory() -> None:
    _, table = weights(np.random.default_rng(1), "bf16", 5, 32, torch.bfloat16)
    got = ops.embedding(torch.tensor([-1, 99], dtype=torch.int32), table)
    assert torch.equal(got, table.data[[0, 4]])


@pytest.mark.parametrize("format", ["bf16", "q4_1"])
def test_fixed_tiles_do_not_see_neighbours(format: str) -> None:
    rng = np.random.default_rng(2)
    _, weight = weights(rng, format, 40, 256, torch.bfloat16, fixed_tiles=True)
    x = to_torch(normal(rng, 40, 256), torch.bfloat16)
    whole = ops.linear(x, weight)
    for rows in (slice(0, 1), slice(7, 9), slice(3, 40)):
        assert torch.equal(ops.linear(x[rows].clone(), weight), whole[rows])


@pytest.mark.parametrize("extras", ["", "b", "r", "br", "o", "bro"])
def test_plain_floats_use_the_library(extras: str) -> None:
    rng = np.random.default_rng(3)
    _, weight = weights(rng, "bf16", 33, 48, torch.bfloat16)
    x = to_torch(normal(rng, 6, 48), torch.bfloat16)
    bias = to_torch(normal(rng, 33), torch.float32) if "b" in extras else None
    residual = to_torch(normal(rng, 6, 33), torch.bfloat16) if "r" in extras else None
    out = (residual if residual is not None else torch.zeros(6, 33, dtype=torch.bfloat16)) if "o" in extras else None
    expected = to_numpy(x) @ to_numpy(weight.data).T
    expected += (0 if bias is None else to_numpy(bias)) + (0 if residual is None else to_numpy(residual))
    naive = naive_linear(x, weight, None if bias is None else bias.bfloat16(), residual)
    got = ops.linear(x, weight, bias, residual=residual, out=out)
    assert out is None or got is out
    assert_close(got, expected, naive)


@pytest.mark.parametrize("format, k", [("q8_0", 1056), ("q4_1", 4000)])
def test_parts_of_a_long_product_add_up(format: str, k: int) -> None:
    """Few rows and few outputs: K in parts, the last of them shorter, with everything that is added behind it."""
    rng = np.random.default_rng(k)
    assert module.parts_of(70, k) > 1 and k % (module.parts_of(70, k) * 128)
    host, weight = weights(rng, format, 70, k, torch.bfloat16)
    x, bias, residual = (to_torch(normal(rng, *shape), torch.bfloat16) for shape in ((5, k), (5, 70), (5, 70)))
    for extras in ({}, {"bias_N": bias[0], "residual": residual}):
        expected = to_numpy(x) @ host.dense.T + sum(to_numpy(y) for y in extras.values())
        got = ops.linear(x, weight, **extras)
        assert_close(got, expected, naive_linear(x, weight, *extras.values()))
        assert torch.equal(ops.linear(x[2:4].clone(), weight, **{n: y if y.ndim == 1 else y[2:4].clone() for n, y in extras.items()}), got[2:4])


def test_products_are_cut_up_where_programs_are_few() -> None:
    assert [module.parts_of(n, k) for n, k in ((28672, 4096), (6144, 4096), (4096, 4096), (4096, 14336), (1024, 1024), (128256, 4096))] == [2, 4, 4, 4, 2, 1]


def test_many_rows_are_multiplied_by_the_dequantized_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    _, weight = weights(rng, "q8_0", 20, 64, torch.bfloat16)
    x = to_torch(normal(rng, 9, 64), torch.bfloat16)
    few = ops.linear(x, weight)
    monkeypatch.setattr(module, "MANY_ROWS", 9)
    assert_close(ops.linear(x, weight), to_numpy(x) @ to_numpy(dequantize(weight)).T, few)


def test_matrices_that_cannot_be_packed_are_refused() -> None:
    rng = np.random.default_rng(5)
    place: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match="`q7_0`"):
        pack_for_device("q7_0", [normal(rng, 4, 32)], **place)
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_for_device("q8_0", [normal(rng, 4, 40)], **place)
    with pytest.raises(ValueError, match="different widths"):
        pack_for_device("bf16", [normal(rng, 4, 32), normal(rng, 4, 64)], **place)
    first, second = normal(rng, 4, 32), normal(rng, 3, 32)
    stacked = to_numpy(dequantize(pack_for_device("q8_0", [first, second], **place)))
    alone = [to_numpy(dequantize(pack_for_device("q8_0", [part], **place))) for part in (first, second)]
    np.testing.assert_array_equal(stacked, np.concatenate(alone))
