"""References of the ops that read packed weights: plain float32 arithmetic on the matrix the packing stands for."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from pagoda.kernels.table import implements
from pagoda.kernels.weight import Weight

__all__ = ["embedding", "linear"]

Array = Any


def _matrix(weight: Weight, like: Array) -> Array:
    return array_namespace(like).asarray(weight.dense)


@implements("embedding", device="reference")
def embedding(ids_T: Array, table: Weight, *, scale: float = 1.0) -> Array:
    return array_namespace(ids_T).take(_matrix(table, ids_T), ids_T, axis=0) * scale


@implements("linear", device="reference")
def linear(
    x_TK: Array,
    weight: Weight,
    bias_N: Array | None = None,
    *,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    y_TN = x_TK @ array_namespace(x_TK).matrix_transpose(_matrix(weight, x_TK))
    if bias_N is not None:
        y_TN = y_TN + bias_N
    if residual is not None:
        y_TN = y_TN + residual
    if out is None:
        return y_TN
    out[...] = y_TN
    return out
