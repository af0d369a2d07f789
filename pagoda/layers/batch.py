"""What a forward pass is given: one ragged batch of tokens, and where their keys and values live.

    T  tokens of this step, all sequences one after another        S  sequences
    R  rows whose logits are wanted                                B  width of a block table

There is no prefill batch and no decode batch: a sequence brings as many tokens as were planned for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pagoda.kernels.kv import KvPlane

__all__ = ["Batch", "GroupBatch"]

Array = Any
"""numpy on a CPU, torch on a GPU, symbolic while a program is recorded."""


@dataclass(frozen=True)
class GroupBatch:
    """One KV group's view of the batch."""

    block_table_SB: Array  # int32 block ids
    slots_T: Array  # int64: block id * block_size + offset, where each token's key and value go


@dataclass(frozen=True)
class Batch:
    token_ids_T: Array  # int32
    positions_T: Array  # int32, absolute
    query_start_S1: Array  # int32 (S + 1,): rows [start[s], start[s+1]) belong to sequence s
    seq_lens_S: Array  # int32: tokens of the sequence after this step
    logits_idx_R: Array  # int32: rows of T
    groups: tuple[GroupBatch, ...]
    planes: tuple[KvPlane, ...]
