"""Attention by torch's own `scaled_dot_product_attention`: the fallback for what the Triton kernel has no tiles for.

One sequence after another: its pages are gathered into plain keys and values, and the library does the rest. It asks the device for the
lengths, so it waits for it in every layer and cannot be captured in a graph. No sinks, no 8-bit caches, no soft cap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from pagoda.kernels.triton.plane import DevicePlane

__all__ = ["sdpa_attention"]

Array = Any


def sdpa_attention(
    q_TD: Array, cache: DevicePlane, block_table_SB: Array, query_start_S1: Array, seq_lens_S: Array, *, scale: float, window: int, out: Array
) -> Array:
    """As `ops.attention`; rows of no sequence are left as they are."""
    dim, heads = cache.head_dim, q_TD.shape[1] // cache.head_dim
    starts, lens = query_start_S1.tolist(), seq_lens_S.tolist()
    for s, length in enumerate(lens):
        first, stop = starts[s], starts[s + 1]
        count = stop - first
        if count == 0:
            continue
        pages = block_table_SB[s, : -(-length // cache.block_size)].long()
        k, v = (x[pages].transpose(1, 2).reshape(-1, cache.num_kv_heads, dim)[:length].transpose(0, 1)[None] for x in (cache.k, cache.v))
        q = q_TD[first:stop].reshape(count, heads, dim).transpose(0, 1)[None]
        position = torch.arange(length - count, length, device=q_TD.device)[:, None]
        key = torch.arange(length, device=q_TD.device)[None]
        seen = key <= position
        if window > 0:
            seen = seen & (key > position - window)
        clean = torch.where(seen.any(0)[:, None], v, torch.zeros((), dtype=v.dtype, device=v.device))  # what no query sees may be NaN
        y = scaled_dot_product_attention(q, k.to(q.dtype), clean.to(q.dtype), attn_mask=seen, scale=scale, enable_gqa=True)
        out[first:stop] = y[0].transpose(0, 1).reshape(count, heads * dim)
    return out
