"""What a decoder-only model is, as data. A family file turns a Hugging Face config into one of these.

A spec is complete: building a model reads nothing else. A field that only one family would use belongs in a block
class of its own, not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pagoda.base.types import KvGroup, ModelFacts
from pagoda.layers.attention import AttentionSpec, KvPlace
from pagoda.layers.mlp import MlpSpec

__all__ = ["BlockSpec", "ModelSpec", "kv_layout"]


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block: x += [norm](attention(norm(x))); x += [norm](mlp(norm(x)))."""

    attention: AttentionSpec
    mlp: MlpSpec
    post_norms: bool = False  # the norms in square brackets (Gemma 2 and 3)


@dataclass(frozen=True)
class ModelSpec:
    architecture: str
    vocab_size: int
    hidden_size: int
    blocks: tuple[BlockSpec, ...]
    norm_eps: float
    max_model_len: int
    dtype: str = "float32"  # of the checkpoint, as ModelFacts.dtype
    norm_plus_one: bool = False  # norm weights are stored as w - 1
    tie_embeddings: bool = True
    embed_scale: float = 1.0
    logit_soft_cap: float = 0.0

    def facts(self) -> ModelFacts:
        """What the brain may know. All layers must have caches of one shape, so that one pool serves them."""
        groups, num_planes = kv_layout(self)
        first = self.blocks[0].attention
        assert all((b.attention.num_kv_heads, b.attention.head_dim) == (first.num_kv_heads, first.head_dim) for b in self.blocks)
        return ModelFacts(
            architecture=self.architecture,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            num_layers=len(self.blocks),
            kv_groups=groups,
            num_kv_planes=num_planes,
            num_kv_heads=first.num_kv_heads,
            head_dim=first.head_dim,
            dtype=self.dtype,
            num_parameters=self.num_parameters,
            even_position=self.even_position,
        )

    @property
    def even_position(self) -> int:
        """See `ModelFacts`. Windows are left out: they only make attention cheaper."""
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        per_key = sum(2 * b.attention.num_heads * b.attention.head_dim for b in self.blocks)
        return (self.num_parameters - tables) // per_key

    @property
    def num_parameters(self) -> int:
        """Weights of linears and tables; norms and biases are noise."""
        total = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        for block in self.blocks:
            a = block.attention
            total += self.hidden_size * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
            total += 3 * self.hidden_size * block.mlp.size
        return total


def kv_layout(spec: ModelSpec) -> tuple[tuple[KvGroup, ...], int]:
    """Groups of layers that share a block table, and the number of planes.

    Layers of one kind (full, or a window of one size) are cut into groups of equal size, the size of the rarest kind,
    so that a block id costs the same bytes whichever group holds it and little is wasted:
    Gemma 3's 5 windows to 1 full layer become 5 window groups and 1 full group.
    """
    kinds: dict[int, list[int]] = {}
    for i, block in enumerate(spec.blocks):
        kinds.setdefault(block.attention.window, []).append(i)
    num_planes = min(len(layers) for layers in kinds.values())
    groups = []
    for window, layers in sorted(kinds.items()):  # full attention (0) first
        count = math.ceil(len(layers) / num_planes)
        for g in range(count):
            part = tuple(layers[g * num_planes : (g + 1) * num_planes])
            groups.append(KvGroup(kind="window" if window else "full", layers=part, window=window))
    return tuple(groups), num_planes


def kv_places(groups: tuple[KvGroup, ...]) -> dict[int, KvPlace]:
    """layer -> its group and plane."""
    return {layer: KvPlace(g, plane) for g, group in enumerate(groups) for plane, layer in enumerate(group.layers)}
