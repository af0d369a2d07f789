"""From the CPU's conformance cases to a GPU's: the same numbers, rounded to a 16-bit type, as torch tensors.

Under TRITON_INTERPRET=0 on a machine with a GPU the tensors lie there, and the same tests run the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton

from pagoda.kernels import ops, table
from pagoda.kernels.kv import KvPlane, allocate_kv_plane, keys_by_token, values_by_token
from pagoda.kernels.triton.plane import DEVICE_KV_TYPES, DevicePlane, allocate_device_plane
from pagoda.kernels.triton.weight import DeviceWeight, pack_for_device
from pagoda.kernels.weight import GgmlRows, Weight, pack, storage_of, width_unit
from tests.kernels.cases import normal, random_rows

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def to_torch(x: Any, dtype: Any) -> Any:
    """numpy -> torch; float32 becomes `dtype`, a column slice stays one, anything else is as it was."""
    if not isinstance(x, np.ndarray):
        return x
    if x.ndim == 2 and x.base is not None and x.strides[0] != x.shape[1] * x.itemsize:
        wide = torch.zeros((x.shape[0], x.shape[1] + 5), dtype=to_torch(x[:1, :1].copy(), dtype).dtype, device=DEVICE)
        wide[:, 2:-3] = to_torch(np.ascontiguousarray(x), dtype)
        return wide[:, 2:-3]
    tensor = torch.from_numpy(np.ascontiguousarray(x).copy()).to(DEVICE)
    return tensor.to(dtype) if x.dtype == np.float32 else tensor


def to_numpy(x: Any) -> Any:
    """torch -> numpy, 16-bit floats as float32."""
    if not isinstance(x, torch.Tensor):
        return x
    x = x.cpu()
    return x.float().numpy().copy() if x.is_floating_point() else x.numpy().copy()


def reference(op: str, *args: Any, **kwargs: Any) -> Any:
    """The reference, of numpy arrays or of torch tensors in their own precision; these it computes on the CPU."""
    args = tuple(x.cpu() if isinstance(x, torch.Tensor) else x for x in args)
    kwargs = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    with table.backend("reference"), torch.device("cpu"):
        return getattr(ops, op)(*args, **kwargs)


def assert_close(got: Any, expected: Any, naive: Any) -> None:
    """At most twice as wrong as the naive computation, and a rounding of float32."""
    got, expected, naive = (np.asarray(to_numpy(x), np.float64) for x in (got, expected, naive))
    assert got.shape == expected.shape
    tolerance = 2 * float(np.abs(naive - expected).max()) + 4e-6 * max(1.0, float(np.abs(expected).max()))
    error = float(np.abs(got - expected).max())
    assert error <= tolerance, f"error {error:.3g} exceeds {tolerance:.3g}"


def device_plane(cache: KvPlane, dtype: Any, *, fp8: bool = False, **kwargs: Any) -> DevicePlane:
    """The pages of a CPU plane as a GPU keeps them, NaN included."""
    name = "fp8_e4m3" if fp8 else NAMES[dtype]
    sizes = {"block_size": cache.block_size, "num_blocks": cache.num_blocks, "num_kv_heads": cache.num_kv_heads}
    plane = allocate_device_plane(dtype=name, head_dim=cache.head_dim, device=DEVICE, **sizes, **kwargs)
    for pages, read, scale in ((plane.k, keys_by_token, plane.k_scale), (plane.v, values_by_token, plane.v_scale)):
        x = to_torch(read(cache, np.arange(cache.num_blocks)).astype(np.float32), torch.float32)
        pages.copy_((x / scale).to(torch.float8_e4m3fn).view(torch.uint8) if fp8 else x.to(DEVICE_KV_TYPES[name]))
    return plane


def host_plane(plane: DevicePlane) -> KvPlane:
    """A float32 CPU plane that holds exactly what a device plane holds."""
    sizes = {"block_size": plane.block_size, "num_blocks": plane.num_blocks, "num_kv_heads": plane.num_kv_heads}
    cache = allocate_kv_plane(dtype="float32", head_dim=plane.head_dim, **sizes)
    k, v = (_floats(plane, pages, scale) for pages, scale in ((plane.k, plane.k_scale), (plane.v, plane.v_scale)))
    cache.v[...] = v
    grouped = k.reshape(*k.shape[:2], plane.block_size // 16, 16, plane.head_dim)
    cache.k[...] = np.moveaxis(grouped, 3, 4)
    return cache


def _floats(plane: DevicePlane, pages: Any, scale: float) -> np.ndarray:
    return to_numpy(pages.view(torch.float8_e4m3fn).float() * scale if plane.dtype == "fp8_e4m3" else pages)


def weights(rng: np.random.Generator, format: str, n: int, k: int, dtype: Any, **kwargs: Any) -> tuple[Weight, DeviceWeight]:
    """One random matrix as a CPU and as a GPU keeps it."""
    part: Any = normal(rng, n, k) / np.sqrt(k)
    if width_unit(format) == 256:
        kind = storage_of(format).upper()
        part = GgmlRows(kind, random_rows(rng, kind, n, k))
    on_device = pack_for_device(format, [part], device=DEVICE, dtype=dtype, **kwargs)
    return pack("f32", [to_numpy(on_device.data)]) if format == "bf16" else pack(format, [part]), on_device


Naive = Callable[..., Any]


def naive_attention(q: Any, plane: DevicePlane, block_table: Any, starts: Any, lens: Any, *, scale: float, head_dim: int,
                    window: int = 0, soft_cap: float = 0.0, sinks_H: Any = None) -> Any:  # fmt: skip
    """Plain attention of one sequence after another in the type of `q`, every intermediate rounded to it."""
    out, dtype = torch.zeros_like(q), q.dtype
    for s, length in enumerate(lens.tolist()):
        rows = slice(int(starts[s]), int(starts[s + 1]))
        count = rows.stop - rows.start
        if count == 0:
            continue
        pages = block_table[s, : -(-length // plane.block_size)].long()
        k, v = (to_torch(_floats(plane, x[pages], f), dtype).transpose(1, 2).flatten(0, 1)[:length]
                for x, f in ((plane.k, plane.k_scale), (plane.v, plane.v_scale)))  # fmt: skip
        group = q.shape[1] // head_dim // plane.num_kv_heads
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = (q[rows].view(count, -1, head_dim).transpose(0, 1) @ k.transpose(1, 2)) * scale
        scores = soft_cap * torch.tanh(scores / soft_cap) if soft_cap else scores
        position, key = torch.arange(length - count, length, device=DEVICE)[:, None], torch.arange(length, device=DEVICE)[None]
        seen = (key <= position) & ((key > position - window) | (window == 0))
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks_H is not None:
            scores = torch.cat([scores, sinks_H.to(dtype)[:, None, None].expand(-1, count, 1)], 2)
        p = torch.softmax(scores, 2)[..., :length]
        out[rows] = (p @ v).transpose(0, 1).reshape(count, -1)
    return out
