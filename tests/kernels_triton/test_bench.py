"""The benchmark on a GPU has a row for every op, and each row calls its op on operands that fit."""

from __future__ import annotations

from pagoda.kernels import logits_ops, ops, table
from pagoda.kernels.triton import bench
from pagoda.kernels.triton.launch import collect


def test_every_op_has_a_kernel_and_a_row_that_runs() -> None:
    """On `meta` tensors: operands take no memory, and launches are collected."""
    found = set()
    for row in bench.rows("meta"):
        with collect() as launches:
            row.call()
        assert launches or row.op in ("add", "scale", "gather_rows", "empty_like_rows", "linear")
        found.add(row.op)
    assert found == {*ops.__all__, *logits_ops.__all__} - {"sample_masked"}, "a GPU lays masks on all rows of a batch at once"
    assert all("cuda" in table.devices_of(op) for op in found)
