"""Self-attention over the paged cache.

    T tokens   H query heads, G key-value heads of width A      qkv_TE = [ q (H*A) | k (G*A) | v (G*A) ]

Keys and values of this step are written first and read back with all the others: a token sees itself through the
cache, so what it sees never depends on how the prompt was cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pagoda.base.mesh import Mesh
from pagoda.kernels import ops
from pagoda.layers.batch import Batch
from pagoda.layers.linear import Linear
from pagoda.layers.norm import RmsNorm
from pagoda.layers.rope import Rope, RopeSpec
from pagoda.loader.place import Place
from pagoda.quant.scheme import Precision

__all__ = ["Attention", "AttentionSpec", "KvPlace"]


@dataclass(frozen=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    window: int = 0  # tokens a query may see, itself included; 0: all
    soft_cap: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class KvPlace:
    """Where a layer's keys and values live: which block table, which plane."""

    group: int
    plane: int


class Attention:
    def __init__(
        self, spec: AttentionSpec, hidden_size: int, rope: Rope, place: KvPlace, *, eps: float, plus_one: bool, precision: Precision, mesh: Mesh
    ) -> None:
        self._spec, self._rope, self._place = spec, rope, place
        self._q = slice(0, spec.num_heads * spec.head_dim)
        self._k = slice(self._q.stop, self._q.stop + spec.num_kv_heads * spec.head_dim)
        self._v = slice(self._k.stop, self._k.stop + spec.num_kv_heads * spec.head_dim)
        widths = {"q": self._q.stop, "k": self._k.stop - self._k.start, "v": self._v.stop - self._v.start}
        self.qkv = Linear(hidden_size, widths, bias=spec.qkv_bias, precision=precision, mesh=mesh)
        self.out = Linear(self._q.stop, {"o": hidden_size}, bias=spec.out_bias, precision=precision, mesh=mesh)
        self.q_norm = RmsNorm(spec.head_dim, eps, plus_one=plus_one) if spec.qk_norm else None
        self.k_norm = RmsNorm(spec.head_dim, eps, plus_one=plus_one) if spec.qk_norm else None

    def slots(self, prefix: str) -> dict[str, Any]:
        found = {**self.qkv.slots(prefix), **self.out.slots(prefix)}
        if self.q_norm and self.k_norm:
            found |= self.q_norm.slots(f"{prefix}q_norm") | self.k_norm.slots(f"{prefix}k_norm")
        return found

    def finish(self, place: Place) -> None:
        """Called once when every tensor of the model is loaded."""
        self.qkv.finish()
        self.out.finish()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.finish(place)

    def __call__(self, x_TD: Any, batch: Batch, *, residual: Any = None, rows_R: Any = None) -> Any:
        """-> (T, hidden): attention's output projected, plus `residual`, in the place of which it is left.

        With `rows_R` only of these rows, of which `residual` then is: keys and values are written for all.
        """
        spec = self._spec
        qkv_TE = self.qkv(x_TD)
        q_TQ, k_TK, v_TK = qkv_TE[:, self._q], qkv_TE[:, self._k], qkv_TE[:, self._v]
        if self.q_norm and self.k_norm:
            self.q_norm(q_TQ, out=q_TQ)
            self.k_norm(k_TK, out=k_TK)
        self._rope(qkv_TE[:, : self._k.stop], batch.positions_T)  # queries and keys at once
        group, plane = batch.groups[self._place.group], batch.planes[self._place.plane]
        ops.kv_write(k_TK, v_TK, plane, group.slots_T)
        o_TQ = ops.attention(
            q_TQ, plane, group.block_table_SB, batch.query_start_S1, batch.seq_lens_S,
            scale=spec.scale, head_dim=spec.head_dim, window=spec.window, soft_cap=spec.soft_cap,
        )  # fmt: skip
        if rows_R is not None:
            o_TQ = ops.gather_rows(o_TQ, rows_R)
        return self.out(o_TQ, residual=residual, out=residual)
