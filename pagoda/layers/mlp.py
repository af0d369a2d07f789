"""The gated feed-forward block: down(act(gate(x)) * up(x)) (Shazeer, 2020, arXiv:2002.05202)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pagoda.base.mesh import Mesh
from pagoda.kernels import ops
from pagoda.layers.linear import Linear
from pagoda.quant.scheme import Precision

__all__ = ["Mlp", "MlpSpec"]


@dataclass(frozen=True)
class MlpSpec:
    size: int
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    bias: bool = False


class Mlp:
    def __init__(self, spec: MlpSpec, hidden_size: int, *, precision: Precision, mesh: Mesh) -> None:
        self._activation = spec.activation
        self.gate_up = Linear(hidden_size, {"gate": spec.size, "up": spec.size}, bias=spec.bias, precision=precision, mesh=mesh)
        self.down = Linear(spec.size, {"down": hidden_size}, bias=spec.bias, precision=precision, mesh=mesh)

    def slots(self, prefix: str) -> dict[str, Any]:
        return {**self.gate_up.slots(prefix), **self.down.slots(prefix)}

    def __call__(self, x_TD: Any, *, residual: Any = None) -> Any:
        """-> (T, hidden), plus `residual`, in the place of which it is left."""
        return self.down(ops.act_and_mul(self.gate_up(x_TD), self._activation), residual=residual, out=residual)
