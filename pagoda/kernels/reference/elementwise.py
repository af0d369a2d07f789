"""References of the ops that work row by row. Formulas and shapes are in `pagoda.kernels.ops`."""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import array_namespace

from pagoda.kernels.table import implements

__all__ = [
    "act_and_mul",
    "add",
    "empty_like_rows",
    "gather_rows",
    "rms_norm",
    "rope",
    "row_is_finite",
    "row_logsumexp",
    "scale",
    "soft_cap",
]

Array = Any


def _into(out: Array | None, value: Array) -> Array:
    if out is None:
        return value
    out[...] = value
    return out


@implements("rms_norm", device="reference")
def rms_norm(x_TD: Array, weight_G: Array, *, eps: float, residual: Array | None = None, out: Array | None = None) -> Array:
    xp = array_namespace(x_TD)
    if residual is not None:
        x_TD = _into(residual, x_TD + residual)
    x = xp.reshape(x_TD, (x_TD.shape[0], -1, weight_G.shape[0]))
    mean_square = xp.mean(x * x, axis=-1, keepdims=True)
    y = x / xp.sqrt(mean_square + eps) * weight_G
    return _into(out, xp.reshape(y, x_TD.shape))


@implements("rope", device="reference")
def rope(
    x_TD: Array, positions_T: Array, cos_sin_PR: Array, *, head_dim: int, out: Array | None = None
) -> Array:
    xp = array_namespace(x_TD)
    half = cos_sin_PR.shape[1] // 2
    angles = xp.take(cos_sin_PR, positions_T, axis=0)[:, None, :]
    cos, sin = angles[..., :half], angles[..., half:]
    x = xp.reshape(x_TD, (x_TD.shape[0], -1, head_dim))
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    y = xp.concat([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
    return _into(out, xp.reshape(y, x_TD.shape))


@implements("act_and_mul", device="reference")
def act_and_mul(x_T2F: Array, kind: str, *, out: Array | None = None) -> Array:
    width = x_T2F.shape[1] // 2
    return _into(out, activation(x_T2F[:, :width], kind) * x_T2F[:, width:])


def activation(x: Array, kind: str) -> Array:
    """act(x), elementwise. ValueError for a kind that does not exist."""
    xp = array_namespace(x)
    if kind == "silu":
        return x * (0.5 * (1 + xp.tanh(0.5 * x)))  # x * sigmoid(x), which cannot overflow
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    if kind == "gelu":
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    if kind == "relu":
        return xp.where(x > 0, x, xp.zeros_like(x))
    raise ValueError(f"activation `{kind}` is not one of silu, gelu_tanh, gelu, relu")


def _erf(x: Array) -> Array:
    """erf by its series below 3 in magnitude; beyond, 1 - erfc by a continued fraction. Exact to float32 rounding."""
    xp = array_namespace(x)
    z = xp.abs(xp.astype(x, xp.float64))
    small = xp.where(z < 3, z, xp.zeros_like(z))
    term, total = small, small
    for n in range(1, 60):
        term = -term * small * small / n
        total = total + term / (2 * n + 1)
    large = xp.where(z < 3, xp.full_like(z, 3.0), z)
    fraction = large
    for n in range(40, 0, -1):
        fraction = large + (n / 2) / fraction
    tail = 1 - xp.exp(-large * large) / (fraction * math.sqrt(math.pi))
    value = xp.where(z < 3, total * (2 / math.sqrt(math.pi)), tail)
    return xp.astype(xp.where(x < 0, -value, value), x.dtype)


@implements("add", device="reference")
def add(x_TD: Array, y_TD: Array, *, out: Array | None = None) -> Array:
    return _into(out, x_TD + y_TD)


@implements("scale", device="reference")
def scale(x_TD: Array, factor: float, *, out: Array | None = None) -> Array:
    return _into(out, x_TD * factor)


@implements("soft_cap", device="reference")
def soft_cap(x_TD: Array, cap: float, *, out: Array | None = None) -> Array:
    xp = array_namespace(x_TD)
    return _into(out, cap * xp.tanh(x_TD / cap))


@implements("gather_rows", device="reference")
def gather_rows(x_TD: Array, idx_R: Array) -> Array:
    return array_namespace(x_TD).take(x_TD, idx_R, axis=0)


@implements("empty_like_rows", device="reference")
def empty_like_rows(x_TD: Array, cols: int) -> Array:
    xp = array_namespace(x_TD)
    return xp.empty((x_TD.shape[0], cols), dtype=xp.float32)


@implements("row_logsumexp", device="reference")
def row_logsumexp(logits_RV: Array) -> Array:
    xp = array_namespace(logits_RV)
    x = xp.astype(logits_RV, xp.float64)
    top = xp.max(x, axis=1, keepdims=True)
    shift = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    total = xp.sum(xp.exp(x - shift), axis=1)
    dead = total == 0
    value = xp.log(xp.where(dead, xp.ones_like(total), total)) + shift[:, 0]
    return xp.astype(xp.where(dead, xp.full_like(value, -math.inf), value), xp.float32)


@implements("row_is_finite", device="reference")
def row_is_finite(logits_RV: Array) -> Array:
    xp = array_namespace(logits_RV)
    bad = xp.any(xp.isnan(logits_RV) | (logits_RV == math.inf), axis=1)
    return ~bad & xp.any(logits_RV > -math.inf, axis=1)
