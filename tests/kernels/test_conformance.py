"""Every op, on every instruction set, against the float32 reference."""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np
import pytest

from pagoda.kernels import bench, logits_ops, ops, table
from pagoda.kernels.kv import KvPlane

from .cases import CASES, Case


def run(case: Case, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = copy.deepcopy((args, kwargs))  # an op may write its operands
    with table.backend(backend):
        result = getattr(ops, case.op)(*args, **kwargs)
    if case.op == "kv_write":
        cache = next(a for a in args if isinstance(a, KvPlane))
        return np.concatenate([cache.k.astype(np.float32).ravel(), cache.v.astype(np.float32).ravel()])
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_agrees_with_reference(case: Case, isa: str) -> None:
    with table.backend("reference"):
        args, kwargs = case.make(np.random.default_rng(zlib.crc32(str(case).encode())))
    expected = run(case, "reference", args, kwargs)
    got = run(case, "cpu", args, kwargs)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if case.op == "empty_like_rows":
        return
    if case.exact:
        np.testing.assert_array_equal(got, expected)
        return
    rounding = 4e-6 * max(1.0, float(np.abs(expected).max()))
    tolerance = rounding
    if case.naive is not None:
        tolerance += 2 * float(np.abs(case.naive(*args, **kwargs) - expected).max())
    error = float(np.abs(got - expected).max())
    assert error <= tolerance, f"error {error:.3g} exceeds {tolerance:.3g}"


def test_every_op_has_a_case() -> None:
    assert {case.op for case in CASES} == set(ops.__all__)


def test_every_op_has_reference_native_and_recording() -> None:
    for op in ops.__all__:
        assert {"reference", "cpu", "record"} <= set(table.devices_of(op)), op
    assert set(table.ops_registered()) == {*ops.__all__, *logits_ops.__all__}


def test_every_op_has_a_bench_row_that_runs() -> None:
    assert {row.op for row in bench.ROWS} == set(ops.__all__)
    assert table.numpy_device() == "cpu"
    for op in ops.__all__:
        row = min((r for r in bench.ROWS if r.op == op), key=lambda r: r.nbytes * r.copies)
        assert bench.measure(row, seconds=0.0) > 0
