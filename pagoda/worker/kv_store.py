"""The memory behind the block ids: one plane per layer of a KV group (see `ModelFacts.kv_groups`)."""

from __future__ import annotations

import numpy as np

from pagoda.base.types import ModelFacts
from pagoda.kernels.kv import KvPlane, allocate_kv_plane, bytes_per_block, copy_blocks

__all__ = ["KvStore", "block_nbytes"]


def block_nbytes(facts: ModelFacts, *, dtype: str, block_size: int) -> int:
    """Bytes of one block id: its share of every plane."""
    one = bytes_per_block(dtype=dtype, block_size=block_size, num_kv_heads=facts.num_kv_heads, head_dim=facts.head_dim)
    return one * facts.num_kv_planes


class KvStore:
    """Pages are reserved at once and cost memory when first written."""

    def __init__(self, facts: ModelFacts, *, dtype: str, block_size: int, num_blocks: int) -> None:
        self.block_size = block_size
        self.planes: tuple[KvPlane, ...] = tuple(
            allocate_kv_plane(
                dtype=dtype, block_size=block_size, num_blocks=num_blocks, num_kv_heads=facts.num_kv_heads, head_dim=facts.head_dim
            )
            for _ in range(facts.num_kv_planes)
        )

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies blocks (source, destination) in every plane."""
        source, target = (np.array(ids, np.int64) for ids in zip(*pairs, strict=True))
        for plane in self.planes:
            copy_blocks(plane, source, target)
