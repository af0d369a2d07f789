"""The one dense decoder: Llama, Mistral, Qwen and Gemma are specs of it.

    x = embed(ids)                                   T tokens, D hidden, R rows that need logits, V vocabulary
    for each block:
        x = x + [norm](attention(norm(x)))           in the last block only of the R rows from here on: nobody asks for the others
        x = x + [norm](mlp(norm(x)))
    logits = head(norm(x))
"""

from __future__ import annotations

from typing import Any, Protocol

from pagoda.base.mesh import Mesh
from pagoda.kernels import ops
from pagoda.layers.attention import Attention, KvPlace
from pagoda.layers.batch import Batch
from pagoda.layers.embedding import VocabTable
from pagoda.layers.mlp import Mlp
from pagoda.layers.norm import RmsNorm
from pagoda.layers.rope import Rope, RopeSpec
from pagoda.loader.place import Place
from pagoda.loader.slot import Slot
from pagoda.models.spec import BlockSpec, ModelSpec, kv_places
from pagoda.quant.scheme import Precision

__all__ = ["Decoder", "Model"]


class Model(Protocol):
    """What the worker asks of a model."""

    def slots(self) -> dict[str, Slot]:
        """Canonical tensor name -> the place it goes."""

    def finish(self) -> None:
        """All tensors are loaded."""

    def forward(self, batch: Batch, hidden_in: Any = None) -> Any:
        """-> hidden_RD of the rows the batch asks for. `hidden_in` replaces the embedding on later pipeline stages."""

    def logits(self, hidden_RD: Any) -> Any:
        """-> logits_RV."""

    @property
    def nbytes(self) -> int: ...

    @property
    def formats(self) -> set[str]: ...

    @property
    def max_heads(self) -> int:
        """Query heads of the layer that has most."""

    @property
    def has_soft_cap(self) -> bool:
        """Whether a layer caps its attention scores."""


class _Block:
    def __init__(self, spec: BlockSpec, model: ModelSpec, rope: Rope, place: KvPlace, precision: Precision, mesh: Mesh) -> None:
        def norm() -> RmsNorm:
            return RmsNorm(model.hidden_size, model.norm_eps, plus_one=model.norm_plus_one)

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention_post_norm = norm() if spec.post_norms else None
        self.mlp_post_norm = norm() if spec.post_norms else None
        self.attention = Attention(
            spec.attention, model.hidden_size, rope, place, eps=model.norm_eps, plus_one=model.norm_plus_one, precision=precision, mesh=mesh
        )
        self.mlp = Mlp(spec.mlp, model.hidden_size, precision=precision, mesh=mesh)

    def slots(self, prefix: str) -> dict[str, Any]:
        found = self.attention_norm.slots(f"{prefix}attention_norm") | self.mlp_norm.slots(f"{prefix}mlp_norm")
        if self.attention_post_norm and self.mlp_post_norm:
            found |= self.attention_post_norm.slots(f"{prefix}attention_post_norm")
            found |= self.mlp_post_norm.slots(f"{prefix}mlp_post_norm")
        return found | self.attention.slots(f"{prefix}attention.") | self.mlp.slots(f"{prefix}mlp.")

    def __call__(self, x_TD: Any, batch: Batch, rows_R: Any = None) -> Any:
        """-> x_TD, or with `rows_R` these rows of it."""
        h_TD = self.attention_norm(x_TD)
        if rows_R is not None:
            x_TD = ops.gather_rows(x_TD, rows_R)
        if self.attention_post_norm is None:
            x_TD = self.attention(h_TD, batch, residual=x_TD, rows_R=rows_R)
        else:
            x_TD = ops.add(x_TD, self.attention_post_norm(self.attention(h_TD, batch, rows_R=rows_R)))
        h_TD = self.mlp_norm(x_TD)
        if self.mlp_post_norm is None:
            return self.mlp(h_TD, residual=x_TD)
        return ops.add(x_TD, self.mlp_post_norm(self.mlp(h_TD)))

    def finish(self, place: Place) -> None:
        for norm in (self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm):
            if norm is not None:
                norm.finish(place)
        self.attention.finish(place)
        self.mlp.gate_up.finish()
        self.mlp.down.finish()

    def linears(self) -> list[Any]:
        return [self.attention.qkv, self.attention.out, self.mlp.gate_up, self.mlp.down]


class Decoder:
    """`max_positions` bounds the rotary tables; `precision` is what weights and their products are to be."""

    def __init__(self, spec: ModelSpec, *, precision: Precision, max_positions: int, mesh: Mesh | None = None) -> None:
        mesh = mesh or Mesh()
        assert mesh.pp.size == 1, "pipeline stages come with the communicators"
        self.spec = spec
        self._precision = precision
        places = kv_places(spec.facts().kv_groups)
        ropes: dict[RopeSpec, Rope] = {}
        self._blocks = []
        for i, block in enumerate(spec.blocks):
            rope_spec = block.attention.rope
            rope = ropes.setdefault(rope_spec, ropes.get(rope_spec) or Rope(rope_spec, max_positions, block.attention.head_dim))
            self._blocks.append(_Block(block, spec, rope, places[i], precision, mesh))
        self._ropes = list(ropes.values())
        self._embed = VocabTable(spec.vocab_size, spec.hidden_size, precision=precision)
        self._head = self._embed if spec.tie_embeddings else VocabTable(spec.vocab_size, spec.hidden_size, precision=precision)
        self._norm = RmsNorm(spec.hidden_size, spec.norm_eps, plus_one=spec.norm_plus_one)

    def slots(self) -> dict[str, Slot]:
        found = self._embed.slots("embed") | self._norm.slots("norm")
        if self._head is not self._embed:
            found |= self._head.slots("head")
        for i, block in enumerate(self._blocks):
            found |= block.slots(f"layers.{i}.")
        return found

    def finish(self) -> None:
        place = self._precision.place
        for part in (*self._blocks, *self._ropes, self._norm):
            part.finish(place)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and rotary tables."""
        tables = self._embed.nbytes + (self._head.nbytes if self._head is not self._embed else 0)
        return tables + sum(r.nbytes for r in self._ropes) + sum(linear.nbytes for b in self._blocks for linear in b.linears())

    @property
    def formats(self) -> set[str]:
        """Packed formats in use, for the start-up report."""
        return self._embed.formats | self._head.formats | {f for b in self._blocks for linear in b.linears() for f in linear.formats}

    @property
    def max_heads(self) -> int:
        return max(block.attention.num_heads for block in self.spec.blocks)

    @property
    def has_soft_cap(self) -> bool:
        return any(block.attention.soft_cap > 0 for block in self.spec.blocks)

    def forward(self, batch: Batch, hidden_in: Any = None) -> Any:
        x_TD = self._embed.embed(batch.token_ids_T, scale=self.spec.embed_scale) if hidden_in is None else hidden_in
        for block in self._blocks[:-1]:
            x_TD = block(x_TD, batch)
        return self._blocks[-1](x_TD, batch, batch.logits_idx_R)

    def logits(self, hidden_RD: Any) -> Any:
        logits_RV = self._head.project(self._norm(hidden_RD))
        if self.spec.logit_soft_cap:
            logits_RV = ops.soft_cap(logits_RV, self.spec.logit_soft_cap, out=logits_RV)
        return logits_RV
