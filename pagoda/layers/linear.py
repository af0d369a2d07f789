"""Linear layers: y = x W^T + b. Several outputs of one input (q, k, v; gate, up) are one layer with several parts.

Parts of one storage format are packed into one weight, so that they are one product; parts of different formats stay
apart and write into column slices of one output. Either way the caller sees one array with the parts side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.base.mesh import Mesh
from pagoda.kernels import ops
from pagoda.kernels.weight import Weight
from pagoda.layers.parameter import Vector
from pagoda.loader.slot import check_shape
from pagoda.loader.tensor import SourceTensor
from pagoda.quant.scheme import Precision, Scheme, scheme_for

__all__ = ["Linear"]


class Linear:
    """`parts` maps a name to its number of outputs, in output order. The product is split over `mesh.tp` later."""

    def __init__(self, in_features: int, parts: dict[str, int], *, bias: bool, precision: Precision, mesh: Mesh) -> None:
        assert mesh.tp.size == 1, "tensor parallel linears come with the communicators"
        self.in_features, self.parts = in_features, parts
        self.out_features = sum(parts.values())
        self._precision = precision
        self._sources: dict[str, SourceTensor] = {}
        self._pieces: list[tuple[slice, Scheme, Weight]] = []
        self._biases = {name: Vector(size) for name, size in parts.items()} if bias else {}
        self._bias_N: Any = None

    def slots(self, prefix: str) -> dict[str, Any]:
        """`{prefix}{part}.weight` and `.bias` -> slot. A single part may be called "" (the prefix is its name)."""
        found: dict[str, Any] = {}
        for name in self.parts:
            path = f"{prefix}{name}"
            found[f"{path}.weight"] = _LinearSlot(self, name)
            if name in self._biases:
                found[f"{path}.bias"] = self._biases[name]
        return found

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for _, _, weight in self._pieces)

    @property
    def formats(self) -> set[str]:
        return {weight.format for _, _, weight in self._pieces}

    def take(self, part: str, source: SourceTensor) -> None:
        """Keeps a view of the source; once all parts are there, packs them and lets the sources go."""
        check_shape(source, (self.parts[part], self.in_features))
        self._sources[part] = source
        if len(self._sources) == len(self.parts):
            self._pack()

    @property
    def is_packed(self) -> bool:
        return bool(self._pieces)

    def is_loaded(self, part: str) -> bool:
        return bool(self._pieces) or part in self._sources

    def _pack(self) -> None:
        start, run, run_start = 0, [], 0
        runs: list[tuple[slice, list[SourceTensor]]] = []
        for name, size in self.parts.items():
            source = self._sources[name]
            if run and self._format(source) != self._format(run[0]):
                runs.append((slice(run_start, start), run))
                run, run_start = [], start
            run.append(source)
            start += size
        runs.append((slice(run_start, start), run))
        self._pieces = [(columns, scheme_for(parts[0]), scheme_for(parts[0]).pack(parts, self._precision)) for columns, parts in runs]
        self._sources.clear()

    def _format(self, source: SourceTensor) -> str:
        return scheme_for(source).format_of(source, self._precision)

    def finish(self) -> None:
        """Called once when every tensor of the model is loaded."""
        if self._biases:
            bias_N = np.concatenate([bias.array for bias in self._biases.values()])
            self._bias_N = self._precision.place.vector(bias_N, is_addend=True)

    def __call__(self, x_TK: Any, *, residual: Any = None, out: Any = None) -> Any:
        """-> y_TN float32, parts side by side; `residual` (T, N) is added."""
        if len(self._pieces) == 1:
            _, scheme, weight = self._pieces[0]
            return scheme.apply(x_TK, weight, self._bias_N, residual=residual, out=out)
        y_TN = ops.empty_like_rows(x_TK, self.out_features) if out is None else out
        for columns, scheme, weight in self._pieces:
            bias_N = None if self._bias_N is None else self._bias_N[columns]
            add = None if residual is None else residual[:, columns]
            scheme.apply(x_TK, weight, bias_N, residual=add, out=y_TN[:, columns])
        return y_TN


class _LinearSlot:
    is_optional = False

    def __init__(self, layer: Linear, part: str) -> None:
        self._layer, self._part = layer, part

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._layer.parts[self._part], self._layer.in_features)

    @property
    def is_loaded(self) -> bool:
        return self._layer.is_loaded(self._part)

    @property
    def is_packed(self) -> bool:
        return self._layer.is_packed

    def load(self, source: SourceTensor) -> None:
        self._layer.take(self._part, source)
