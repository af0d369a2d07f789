"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), rotate-half layout, with the scalings families use.

    angle(p, i) = p * f_i        f_i = theta^(-2i/R), i < R/2        R: rotated columns of a head

    linear   f_i / factor
    llama3   long wavelengths divided by factor, short ones kept, smooth in between (Llama 3.1)
    factors  f_i / factors_i, as GGUF files store llama3 and longrope
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pagoda.kernels import ops
from pagoda.loader.place import Place

__all__ = ["Rope", "RopeSpec", "rope_table"]


@dataclass(frozen=True)
class RopeSpec:
    theta: float
    rotary_dim: int  # columns of a head that turn; the rest pass through
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    factors: tuple[float, ...] = ()


def frequencies(spec: RopeSpec) -> np.ndarray:
    """f_i, float32 (R/2,). float32 throughout, as the models were trained."""
    exponents = np.arange(0, spec.rotary_dim, 2, dtype=np.float32) / np.float32(spec.rotary_dim)
    f = (np.float32(1.0) / np.power(np.float32(spec.theta), exponents)).astype(np.float32)
    if spec.factors:
        return f / np.asarray(spec.factors, np.float32)
    if spec.kind == "linear":
        return f / np.float32(spec.factor)
    if spec.kind == "llama3":
        return _llama3(f, spec)
    return f


def _llama3(f: np.ndarray, spec: RopeSpec) -> np.ndarray:
    wavelength = 2 * math.pi / f
    longest = spec.original_max_positions / spec.low_freq_factor
    shortest = spec.original_max_positions / spec.high_freq_factor
    smooth = (spec.original_max_positions / wavelength - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    between = (1 - smooth) * f / spec.factor + smooth * f
    scaled = np.where(wavelength > longest, f / spec.factor, np.where(wavelength < shortest, f, between))
    return scaled.astype(np.float32)


def rope_table(spec: RopeSpec, num_positions: int) -> np.ndarray:
    """float32 (P, R): cos in the first half of the columns, sin in the second."""
    angles_PR2 = np.outer(np.arange(num_positions, dtype=np.float32), frequencies(spec))
    return np.concatenate([np.cos(angles_PR2), np.sin(angles_PR2)], axis=1).astype(np.float32)


class Rope:
    """Shares one table among the layers that turn alike."""

    def __init__(self, spec: RopeSpec, num_positions: int, head_dim: int) -> None:
        self._table_PR: Any = rope_table(spec, num_positions)
        self._head_dim = head_dim

    @property
    def nbytes(self) -> int:
        return int(self._table_PR.nbytes)

    def finish(self, place: Place) -> None:
        self._table_PR = place.vector(self._table_PR)

    def __call__(self, x_TD: Any, positions_T: Any) -> Any:
        """Turns every head of `x_TD` in place."""
        return ops.rope(x_TD, positions_T, self._table_PR, head_dim=self._head_dim, out=x_TD)
