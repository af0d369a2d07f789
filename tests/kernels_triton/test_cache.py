"""The paged cache on a GPU: writing, the 8-bit type, and attention over the CPU's conformance cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pagoda.kernels import ops
from pagoda.kernels.triton import attention as module
from pagoda.kernels.triton.plane import DevicePlane, allocate_device_plane, device_bytes_per_block, read_device_tokens
from tests.kernels.cases import CASES, Case, normal

from .bridge import (
    DEVICE,
    TYPES,
    assert_close,
    device_plane,
    host_plane,
    naive_attention,
    reference,
    to_numpy,
    to_torch,
)
from .test_ops import dtypes, rng_of

ATTENTION = [c for c in CASES if c.op == "attention" and c.name.startswith("bfloat16")]


def attention_inputs(case: Case, dtype: Any, **plane: Any) -> tuple[list[Any], dict[str, Any]]:
    (q, cache, *tables), kwargs = case.make(rng_of(case))
    return [to_torch(q, dtype), device_plane(cache, dtype, **plane), *(to_torch(x, dtype) for x in tables)], kwargs


def check_attention(args: list[Any], kwargs: dict[str, Any]) -> Any:
    q, plane, *tables = args
    sinks = {"sinks_H": to_numpy(kwargs["sinks_H"])} if "sinks_H" in kwargs else {}
    expected = reference("attention", to_numpy(q), host_plane(plane), *(to_numpy(x) for x in tables), **(kwargs | sinks))
    got = ops.attention(*args, **kwargs)
    assert got.dtype == q.dtype
    assert_close(got, expected, naive_attention(*args, **kwargs))
    return got


@dtypes
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_agrees_with_reference(case: Case, dtype: Any) -> None:
    check_attention(*attention_inputs(case, dtype))


def decode_inputs(dtype: Any, *, lens: list[int], group: int, dim: int = 64, split: int = 64, fp8: bool = False, fixed: bool = False) -> list[Any]:
    """One query per sequence over contexts of several splits; the last sequence is padding of the batch."""
    rng = np.random.default_rng(len(lens) + group)
    pages = [-(-n // 16) for n in lens]
    kind = "fp8_e4m3" if fp8 else {torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
    plane = allocate_device_plane(
        dtype=kind, block_size=16, num_blocks=sum(pages) + 1, num_kv_heads=2, head_dim=dim, device=DEVICE,
        k_scale=0.02 if fp8 else 1.0, v_scale=0.5 if fp8 else 1.0, split_tokens=split, fixed_tiles=fixed,
    )  # fmt: skip
    plane.k.fill_(0x7F if fp8 else torch.nan)
    plane.v.fill_(0x7F if fp8 else torch.nan)
    order = rng.permutation(sum(pages)).astype(np.int32)
    table = np.full((len(lens) + 1, max(pages)), sum(pages), np.int32)
    for s, n in enumerate(lens):
        table[s, : pages[s]] = order[sum(pages[:s]) : sum(pages[: s + 1])]
        at = np.arange(n)
        for pages_NHPD, scale in ((plane.k, plane.k_scale), (plane.v, plane.v_scale)):
            x = to_torch(normal(rng, n, 2, dim), torch.float32) / scale
            x = x.to(torch.float8_e4m3fn).view(torch.uint8) if fp8 else x.to(dtype)
            pages_NHPD[to_torch(table[s, at // 16], torch.float32).long(), :, to_torch(at % 16, torch.float32)] = x
    q = to_torch(normal(rng, len(lens), 2 * group * dim), dtype)
    starts = torch.tensor([*range(len(lens) + 1), len(lens)], dtype=torch.int32)
    return [q, plane, to_torch(table, torch.float32), starts, torch.tensor([*lens, 0], dtype=torch.int32)]


@dtypes
@pytest.mark.parametrize("extras", ["", "window", "cap", "sinks"])
def test_split_contexts(extras: str, dtype: Any) -> None:
    args = decode_inputs(dtype, lens=[1, 200, 64, 65], group=3)
    kwargs: dict[str, Any] = {"scale": 0.125, "head_dim": 64}
    kwargs |= {"window": {"window": 70}, "cap": {"soft_cap": 2.0}, "sinks": {"sinks_H": torch.linspace(-2, 3, 6)}}.get(extras, {})
    check_attention(args, kwargs)


def test_many_sequences_are_cut_up_less(monkeypatch: pytest.MonkeyPatch) -> None:
    args = decode_inputs(torch.bfloat16, lens=[1, 700, 256, 257], group=3)
    alone, plane = module.split_of(5, args[1]), args[1]
    monkeypatch.setattr(module, "_MANY_PROGRAMS", 8)
    assert (alone, module.split_of(3, plane), module.split_of(4, plane), module.split_of(4, replace(plane, fixed_tiles=True))) == (64, 64, 256, 64)
    check_attention(args, {"scale": 0.125, "head_dim": 64})
    # What a step may take: four sequences in three splits, or three in eleven.
    assert module.scratch_nbytes(4, 6, 44, plane) == 4 * 3 * 6 * 11 * 66
    assert module.scratch_nbytes(4, 6, 4, plane) == 0


@pytest.mark.parametrize("group", [1, 4, 20])
def test_groups_of_any_size(group: int) -> None:
    check_attention(decode_inputs(torch.bfloat16, lens=[90, 17], group=group, dim=16), {"scale": 0.25, "head_dim": 16})


def test_sinks_in_a_prefill() -> None:
    args = decode_inputs(torch.float16, lens=[90, 17], group=2, dim=32)
    rng = np.random.default_rng(5)
    args[0] = to_torch(normal(rng, 40, 2 * 2 * 32), torch.float16)
    args[3] = torch.tensor([0, 30, 40, 40], dtype=torch.int32)
    check_attention(args, {"scale": 0.2, "head_dim": 32, "sinks_H": torch.tensor([0.5, -1.0, 4.0, 0.0])})


@pytest.mark.parametrize("window", [0, 50])
def test_a_token_is_computed_alike_in_prefill_and_decode(window: int) -> None:
    """With fixed tiles, bit for bit: all queries at once, or one by one as if each were a decoding step."""
    _, plane, table, *_ = decode_inputs(torch.bfloat16, lens=[150], group=3, fixed=True)
    q = to_torch(normal(np.random.default_rng(2), 40, 2 * 3 * 64), torch.bfloat16)
    kwargs: dict[str, Any] = {"scale": 0.125, "head_dim": 64, "window": window}
    whole = ops.attention(q, plane, table[:1], torch.tensor([0, 40], dtype=torch.int32), torch.tensor([150], dtype=torch.int32), **kwargs)
    for i in (0, 17, 18, 39):
        one = torch.tensor([0, 1], dtype=torch.int32)
        alone = ops.attention(q[i : i + 1], plane, table[:1], one, torch.tensor([111 + i], dtype=torch.int32), **kwargs)
        assert torch.equal(whole[i], alone[0])


@dtypes
def test_attention_over_an_8_bit_cache(dtype: Any) -> None:
    check_attention(decode_inputs(dtype, lens=[80, 33], group=2, fp8=True), {"scale": 0.125, "head_dim": 64})
    case = next(c for c in ATTENTION if c.name == "bfloat16-window")
    check_attention(*attention_inputs(case, dtype, fp8=True, k_scale=0.01, v_scale=0.25))


def test_every_8_bit_number() -> None:
    """Kernels code and decode as torch does: each byte, the halves between neighbours, and what is out of range."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    finite = values[:127]
    middle = (finite[1:] + finite[:-1]) / 2
    x = torch.cat([values[~values.isnan()], middle, -middle, torch.nextafter(middle, torch.tensor(0.0)), torch.tensor([448.0, -448.0])])
    x = torch.cat([x, x.new_zeros(-len(x) % 8)]).view(-1, 8)
    plane = allocate_device_plane(dtype="fp8_e4m3", block_size=16, num_blocks=64, num_kv_heads=1, head_dim=8, device=DEVICE)
    ops.kv_write(x, -x, plane, torch.arange(len(x)))
    assert torch.equal(plane.k.flatten(0, 2)[: len(x)], x.to(torch.float8_e4m3fn).view(torch.uint8))
    beyond = torch.tensor([[1e9, -1e9, 449.0, 480.0, 464.0, -465.0, 1e-9, -1e-9]])
    ops.kv_write(beyond, beyond, plane, torch.tensor([0]))
    np.testing.assert_array_equal(to_numpy(read_device_tokens(plane, [0], 1)[0]).flatten(), [448, -448, 448, 448, 448, -448, 0, 0])


@dtypes
def test_written_tokens_come_back(dtype: Any) -> None:
    plane = allocate_device_plane(dtype={v: k for k, v in TYPES.items()}[dtype].replace("bf16", "bfloat16").replace("fp16", "float16"),
                                  block_size=8, num_blocks=5, num_kv_heads=3, head_dim=24, device=DEVICE)  # fmt: skip
    rng = np.random.default_rng(3)
    wide = to_torch(normal(rng, 20, 200), dtype)
    k, v = wide[:, 4:76], wide[:, 100:172]
    at = torch.arange(20)
    slots = torch.tensor([4, 0, 2])[at // 8] * 8 + at % 8
    slots[7] = -1  # not written
    ops.kv_write(k, v, plane, slots)
    for got, x in zip(read_device_tokens(plane, [4, 0, 2], 20), (k, v), strict=True):
        expected = x.float().view(20, 3, 24).clone()
        expected[7] = 0
        assert torch.equal(got, expected)
    assert not plane.k[[1, 3]].any()


def test_sizes_the_kernels_cannot_hold_are_refused() -> None:
    sizes = {"dtype": "bfloat16", "block_size": 16, "num_blocks": 2, "num_kv_heads": 2, "head_dim": 64, "device": DEVICE}
    plane = allocate_device_plane(**sizes)  # type: ignore[arg-type]
    assert device_bytes_per_block(dtype="bfloat16", block_size=16, num_kv_heads=2, head_dim=64) * 2 == plane.nbytes
    for name, value in (("dtype", "int3"), ("block_size", 24), ("head_dim", 300), ("split_tokens", 100)):
        with pytest.raises(ValueError, match=f"`{name}`"):
            allocate_device_plane(**(sizes | {name: value}))  # type: ignore[arg-type]
    args = decode_inputs(torch.bfloat16, lens=[9], group=1)
    with pytest.raises(ValueError, match="head_dim is 32"):
        ops.attention(*args, scale=1.0, head_dim=32)
    assert isinstance(replace(plane, split_tokens=128), DevicePlane)
