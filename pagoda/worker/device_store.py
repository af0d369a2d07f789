"""The memory behind the block ids on a device, and what computes attention over it.

One plane per layer of a KV group, as `kv_store` on a CPU. An attention backend declares what it can do; the chooser takes the first
that can do what is asked, and says why the others were passed over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagoda.base.config import EngineConfig
from pagoda.base.errors import ConfigError
from pagoda.base.resolve import Reason
from pagoda.base.types import ModelFacts
from pagoda.kernels.triton.plane import DevicePlane, allocate_device_plane, device_bytes_per_block
from pagoda.worker.device import Device

__all__ = ["BACKENDS", "AttentionBackend", "DeviceStore", "choose_attention", "device_block_nbytes", "split_tokens"]

_MOST_SPLITS = 32
_SHORTEST_SPLIT = 256


@dataclass(frozen=True)
class AttentionBackend:
    """What a backend can do; `max_head_dim` in numbers, `kv_dtypes` by name."""

    name: str
    kv_dtypes: tuple[str, ...]
    max_head_dim: int
    is_capturable: bool  # its launches depend on shapes alone
    is_invariant: bool  # a row's result can be made independent of its neighbours
    has_soft_cap: bool

    def refuses(self, config: EngineConfig, facts: ModelFacts, *, has_soft_cap: bool) -> str:
        """Why it cannot serve this model so; "" when it can."""
        if has_soft_cap and not self.has_soft_cap:
            return "no soft cap on scores"
        if config.cache.kv_cache_dtype not in self.kv_dtypes:
            return f"no {config.cache.kv_cache_dtype} cache"
        if facts.head_dim > self.max_head_dim:
            return f"heads of {facts.head_dim} are wider than {self.max_head_dim}"
        if config.device.batch_invariant and not self.is_invariant:
            return "its results depend on the batch"
        return ""


BACKENDS = (
    AttentionBackend("triton", ("bfloat16", "float16", "float32", "fp8"), 256, is_capturable=True, is_invariant=True, has_soft_cap=True),
    AttentionBackend("sdpa", ("bfloat16", "float16", "float32"), 512, is_capturable=False, is_invariant=False, has_soft_cap=False),
)
"""In order of preference."""


def choose_attention(config: EngineConfig, facts: ModelFacts, *, has_soft_cap: bool = False) -> tuple[AttentionBackend, Reason]:
    """Raises ConfigError when none can, or the one that was asked for cannot."""
    asked = config.device.attention_backend
    passed = []
    for backend in BACKENDS:
        if asked not in ("auto", backend.name):
            continue
        why = backend.refuses(config, facts, has_soft_cap=has_soft_cap)
        if not why:
            said = "--attention-backend" if asked != "auto" else "; ".join(passed) or "the fastest that can do all that is asked"
            return backend, Reason("attention_backend", backend.name, said)
        passed.append(f"not {backend.name}: {why}")
    raise ConfigError(f"`--attention-backend {asked}`: {'; '.join(passed)}")


def split_tokens(max_model_len: int) -> int:
    """Tokens of a context that one program of a decoding step reads: constant for the engine, and a few dozen splits at most,
    because programs are started for the longest context there can be."""
    wanted = -(-max_model_len // _MOST_SPLITS)
    return max(_SHORTEST_SPLIT, -(-wanted // 64) * 64)


def device_block_nbytes(facts: ModelFacts, *, dtype: str, block_size: int) -> int:
    """Bytes of one block id: its share of every plane."""
    one = device_bytes_per_block(dtype=_PLANE_TYPES.get(dtype, dtype), block_size=block_size, num_kv_heads=facts.num_kv_heads, head_dim=facts.head_dim)
    return one * facts.num_kv_planes


_PLANE_TYPES = {"fp8": "fp8_e4m3"}


class DeviceStore:
    """Takes all its memory at once."""

    def __init__(
        self, device: Device, facts: ModelFacts, *, dtype: str, block_size: int, num_blocks: int, fixed_tiles: bool, split_tokens: int,
        backend: AttentionBackend,
    ) -> None:  # fmt: skip
        self._device, self.backend = device, backend
        device.charge(num_blocks * device_block_nbytes(facts, dtype=dtype, block_size=block_size))
        self.planes: tuple[DevicePlane, ...] = tuple(
            allocate_device_plane(
                dtype=_PLANE_TYPES.get(dtype, dtype), block_size=block_size, num_blocks=num_blocks, num_kv_heads=facts.num_kv_heads,
                head_dim=facts.head_dim, device=device.torch_device, fixed_tiles=fixed_tiles, split_tokens=split_tokens, backend=backend.name,
            )
            for _ in range(facts.num_kv_planes)
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies blocks (source, destination) in every plane; all sources are read before anything is written."""
        source, target = (self._device.upload(np.array(ids, np.int64)) for ids in zip(*pairs, strict=True))
        for plane in self.planes:
            plane.k[target] = plane.k[source]
            plane.v[target] = plane.v[source]
