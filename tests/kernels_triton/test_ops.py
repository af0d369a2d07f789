"""The kernels that work row by row, over the CPU's conformance cases, in both 16-bit types."""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from pagoda.kernels import ops
from tests.kernels.cases import CASES, Case, normal

from .bridge import TYPES, assert_close, reference, to_numpy, to_torch

ROW_WISE = ("rms_norm", "rope", "act_and_mul", "add", "scale", "soft_cap", "gather_rows", "empty_like_rows")
dtypes = pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)


def rng_of(case: Case) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(str(case).encode()))


def in_type(case: Case, dtype: Any) -> tuple[list[Any], dict[str, Any]]:
    """The case's operands as torch tensors; tables of angles and weights of norms stay float32."""
    args, kwargs = case.make(rng_of(case))
    kept = {"rope": 2, "rms_norm": 1}.get(case.op)
    tensors = [to_torch(x, torch.float32 if i == kept else dtype) for i, x in enumerate(args)]
    return tensors, {name: to_torch(x, dtype) for name, x in kwargs.items()}


@dtypes
@pytest.mark.parametrize("case", [c for c in CASES if c.op in ROW_WISE], ids=str)
def test_agrees_with_reference(case: Case, dtype: Any) -> None:
    args, kwargs = in_type(case, dtype)
    expected = reference(case.op, *(to_numpy(x) for x in args), **{name: to_numpy(x) for name, x in kwargs.items()})
    naive_kwargs = copy.deepcopy(kwargs)
    got = getattr(ops, case.op)(*args, **kwargs)
    assert got.dtype == dtype
    if case.op == "empty_like_rows":
        assert got.shape == expected.shape
        return
    naive_args = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    assert_close(got, expected, reference(case.op, *naive_args, **naive_kwargs))


@dtypes
def test_rms_norm_adds_the_residual_first(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, residual = (to_torch(normal(rng, 7, 96), dtype) for _ in range(2))
    weight = to_torch(normal(rng, 96), torch.float32)
    total = to_numpy(x) + to_numpy(residual)
    expected = reference("rms_norm", total, to_numpy(weight), eps=1e-6)
    naive = reference("rms_norm", x + residual, weight.to(dtype), eps=1e-6)
    got = ops.rms_norm(x, weight, eps=1e-6, residual=residual, out=x)
    assert got is x
    assert_close(got, expected, naive)
    np.testing.assert_array_equal(to_numpy(residual), to_numpy(to_torch(total, dtype)))


@dtypes
def test_ops_work_in_place_on_column_slices(dtype: Any) -> None:
    """As layers call them: heads of one qkv array turned and normalised where they lie, their neighbours untouched."""
    rng = np.random.default_rng(1)
    qkv = to_torch(normal(rng, 5, 3 * 64), dtype)
    before = qkv.clone()
    q = qkv[:, 64:128]
    table = to_torch(np.concatenate([np.cos(normal(rng, 9, 16)), np.sin(normal(rng, 9, 16))], 1), torch.float32)
    positions = torch.tensor([0, 8, 3, 3, 1], dtype=torch.int32)
    expected = reference("rope", to_numpy(q), to_numpy(positions), to_numpy(table), head_dim=32)
    naive = reference("rope", q.clone(), positions, table.to(dtype), head_dim=32)
    ops.rope(q, positions, table, head_dim=32, out=q)
    assert_close(q, expected, naive)
    assert torch.equal(qkv[:, :64], before[:, :64]) and torch.equal(qkv[:, 128:], before[:, 128:])
    weight = torch.ones(32)
    expected = reference("rms_norm", to_numpy(q), to_numpy(weight), eps=1e-6)
    ops.rms_norm(q, weight, eps=1e-6, out=q)
    assert_close(q, expected, to_torch(expected, dtype))
    assert torch.equal(qkv[:, :64], before[:, :64]) and torch.equal(qkv[:, 128:], before[:, 128:])


def test_activations_saturate() -> None:
    x = torch.tensor([[-3e4, 3e4, -200.0, 200.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    for kind in ("silu", "gelu_tanh", "gelu"):
        np.testing.assert_array_equal(to_numpy(ops.act_and_mul(x, kind)), to_numpy(torch.relu(x[:, :4])))
    with pytest.raises(ValueError, match="`sin`"):
        ops.act_and_mul(x, "sin")


def test_operands_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="different numbers of rows"):
        ops.rms_norm(x, torch.ones(8), eps=1e-6, out=x[:3])
    with pytest.raises(ValueError, match="columns of `x`"):
        ops.soft_cap(x.t(), 3.0)
