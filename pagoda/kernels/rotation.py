"""Turning rows by an orthogonal matrix, so that no value of a row sticks out: what makes one scale a row enough for 8 bits.

Of a width K = m 2^p with m odd, U is a Hadamard matrix within blocks of 2^p columns and a Hartley matrix across the m blocks:

    U = Hartley_m (x) Hadamard_(2^p),    Hartley[a, b] = cos(2 pi a b / m) + sin(2 pi a b / m)

Both are symmetric and, but for a factor, their own inverses: U U = K, so (x U) (w U)^T / K = x w^T. Turning both sides of a product
changes nothing but what rounding does to it (QuaRot, https://arxiv.org/abs/2404.00456).
"""

from __future__ import annotations

import functools

import numpy as np

__all__ = ["rotate", "waves"]

_FACTOR = 64  # the largest Hadamard matrix multiplied as one


def waves(width: int) -> np.ndarray:
    """Cosines, then sines of 2 pi a b / m for 1 <= a, b <= m / 2 -> float32 (2, m // 2, m // 2): what a kernel makes Hartley_m of."""
    size = _blocks(width)
    order = np.arange(1, size // 2 + 1)
    angles = 2 * np.pi * (np.outer(order, order) % size) / size
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def _blocks(width: int) -> int:
    """m: the largest odd number that divides the width."""
    return width // (width & -width)


@functools.cache
def _hartley(size: int) -> np.ndarray:
    angles = 2 * np.pi * (np.outer(np.arange(size), np.arange(size)) % size) / size
    return (np.cos(angles) + np.sin(angles)).astype(np.float32)


@functools.cache
def _hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotate(rows_NK: np.ndarray) -> np.ndarray:
    """rows U -> float32 (N, K). Twice is K times the rows."""
    num_rows, width = rows_NK.shape
    block = width & -width
    turned = np.asarray(rows_NK, np.float32)
    inner = 1
    while inner < block:
        factor = min(_FACTOR, block // inner)
        if inner == 1:
            turned = turned.reshape(-1, factor) @ _hadamard(factor)
        else:
            turned = _hadamard(factor) @ turned.reshape(-1, factor, inner)
        inner *= factor
    if block < width:
        turned = _hartley(_blocks(width)) @ turned.reshape(-1, _blocks(width), block)
    return turned.reshape(num_rows, width)
