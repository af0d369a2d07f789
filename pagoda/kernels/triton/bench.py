"""How fast each op is on the GPU that is there, beside what its memory can do: GB/s and TFLOP/s per op and shape.

    python -m pagoda.kernels.triton.bench [--only attention,linear]

Shapes are those of one layer of Llama-3.1-8B in bfloat16. Caches are emptied between calls, as a model's other layers do. Calls
run in a CUDA graph, as a decoding step's do: what starting a kernel costs the host is not in the figures.
The last column is the share of the bandwidth that copying a gigabyte reaches.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from pagoda.kernels import logits_ops, ops
from pagoda.kernels.triton.plane import allocate_device_plane
from pagoda.kernels.triton.weight import CHUNK, DeviceWeight

__all__ = ["DeviceRow", "copy_bandwidth", "main", "rows", "seconds_of"]

HIDDEN, HEADS, KV_HEADS, DIM, FFN, VOCAB, BLOCK = 4096, 32, 8, 128, 14336, 128256, 16
Array = Any


@dataclass(frozen=True)
class DeviceRow:
    """One line of the table; `call` runs the op once, bytes and flops are of that."""

    op: str
    shape: str
    call: Callable[[], Any]
    nbytes: float
    flops: float = 0


def _random(device: Any, *shape: int, dtype: Any = torch.bfloat16) -> Array:
    x = torch.empty(shape, dtype=torch.float32, device=device)
    return x.normal_().to(dtype)


def _weight(device: Any, format: str, n: int, k: int, *, fixed_tiles: bool = False) -> DeviceWeight:
    """Random bytes with small scales: products cost the same whatever the numbers."""
    if format == "bf16":
        return DeviceWeight(format, (n, k), torch.bfloat16, 16, _random(device, n, k), fixed_tiles=fixed_tiles)
    bits, group = (8, 32) if format == "q8_0" else (4, 32)
    width, kind = (k, torch.int8) if bits == 8 else (k // 2, torch.uint8)
    assert k % CHUNK == 0
    data = torch.randint(0, 127, (n, width), device=device).to(kind)
    scales = torch.full((k // group, n), 0.01, dtype=torch.float16, device=device)
    minima = scales.clone() if format == "q4_1" else None
    return DeviceWeight(format, (n, k), torch.bfloat16, bits, data, scales, minima, group, 8 if format == "q4_0" else 0)


def _attention(device: Any, dtype: str, seqs: int, queries: int, context: int) -> DeviceRow:
    pages = -(-context // BLOCK)
    plane = allocate_device_plane(
        dtype=dtype, block_size=BLOCK, num_blocks=seqs * pages, num_kv_heads=KV_HEADS, head_dim=DIM, device=device
    )
    table = torch.randperm(seqs * pages, device=device).to(torch.int32).view(seqs, pages)
    starts = torch.arange(seqs + 1, dtype=torch.int32, device=device) * queries
    lens = torch.full((seqs,), context, dtype=torch.int32, device=device)
    q = _random(device, seqs * queries, HEADS * DIM)
    pairs = seqs * queries * (context - (queries - 1) / 2)
    return DeviceRow(
        "attention", f"{dtype} {seqs} seqs x {queries} of {context}",
        lambda: ops.attention(q, plane, table, starts, lens, scale=DIM**-0.5, head_dim=DIM),
        2 * seqs * context * KV_HEADS * DIM * plane.k.element_size() + 4 * q.numel(), 4.0 * DIM * HEADS * pairs,
    )  # fmt: skip


def _linear(device: Any, format: str, tokens: int, n: int, k: int, *, fixed_tiles: bool = False) -> DeviceRow:
    weight, x = _weight(device, format, n, k, fixed_tiles=fixed_tiles), _random(device, tokens, k)
    name = f"{format}{' fixed tiles' if fixed_tiles else ''} {tokens}x{k}x{n}"
    return DeviceRow("linear", name, lambda: ops.linear(x, weight), weight.nbytes + 2 * tokens * (n + k), 2.0 * tokens * n * k)


def _pointwise(device: Any, tokens: int) -> Iterator[DeviceRow]:
    x, wide = _random(device, tokens, HIDDEN), _random(device, tokens, 2 * FFN)
    gain, angles = torch.ones(HIDDEN, device=device), torch.ones(8192, DIM, device=device)
    at = torch.arange(tokens, dtype=torch.int32, device=device)
    size, shape = x.numel() * 2, f"{tokens}x{HIDDEN}"
    plane = allocate_device_plane(
        dtype="bfloat16", block_size=BLOCK, num_blocks=1 + tokens // BLOCK, num_kv_heads=KV_HEADS, head_dim=DIM, device=device
    )
    kv, slots = _random(device, tokens, KV_HEADS * DIM), at.to(torch.int64)
    table = _weight(device, "bf16", 32768, HIDDEN)
    yield DeviceRow("rms_norm", shape, lambda: ops.rms_norm(x, gain, eps=1e-5), 2 * size)
    yield DeviceRow("rms_norm", f"residual {shape}", lambda: ops.rms_norm(x, gain, eps=1e-5, residual=x), 4 * size)
    yield DeviceRow("rope", shape, lambda: ops.rope(x, at, angles, head_dim=DIM, out=x), 2 * size)
    yield DeviceRow("act_and_mul", f"silu {tokens}x{2 * FFN}", lambda: ops.act_and_mul(wide, "silu"), wide.numel() * 3)
    yield DeviceRow("kv_write", f"bfloat16 {tokens}x{KV_HEADS * DIM}", lambda: ops.kv_write(kv, kv, plane, slots), 8 * kv.numel())
    yield DeviceRow("embedding", f"bf16 {shape}", lambda: ops.embedding(at, table), 2 * size)
    yield DeviceRow("add", shape, lambda: ops.add(x, x, out=x), 3 * size)
    yield DeviceRow("scale", shape, lambda: ops.scale(x, 0.5, out=x), 2 * size)
    yield DeviceRow("soft_cap", shape, lambda: ops.soft_cap(x, 30.0, out=x), 2 * size)
    yield DeviceRow("gather_rows", shape, lambda: ops.gather_rows(x, at), 2 * size)
    yield DeviceRow("empty_like_rows", shape, lambda: ops.empty_like_rows(x, HIDDEN), 0)


def _logits(device: Any, rows: int) -> Iterator[DeviceRow]:
    x, shape = _random(device, rows, VOCAB, dtype=torch.float32) * 3, f"{rows}x{VOCAB}"
    ids = torch.zeros((rows, 21), dtype=torch.int64, device=device)
    at = torch.arange(rows, dtype=torch.int32, device=device)
    words = torch.full((rows, -(-VOCAB // 32)), -1, dtype=torch.int32, device=device)
    seen = torch.zeros((rows, VOCAB), dtype=torch.int32, device=device)
    ones, seeds = torch.ones(rows, device=device), torch.ones(rows, dtype=torch.int64, device=device)

    def draw(temperature: float, top_k: int, top_p: float) -> Callable[[], Any]:
        heat, k, p = ones * temperature, at * 0 + top_k, ones * top_p
        return lambda: ops.sample(x, heat, k, p, ones * 0, seeds, seeds)

    size = x.numel() * 4
    yield DeviceRow("sample", f"greedy {shape}", draw(0.0, 0, 1.0), size)
    yield DeviceRow("sample", f"random {shape}", draw(1.0, 0, 1.0), size)
    yield DeviceRow("sample", f"top_k 40, top_p 0.9 {shape}", draw(1.0, 40, 0.9), size)
    yield DeviceRow("sample", f"top_p 0.9 {shape}", draw(1.0, 0, 0.9), size)
    yield DeviceRow("row_logsumexp", shape, lambda: ops.row_logsumexp(x), size)
    yield DeviceRow("row_is_finite", shape, lambda: ops.row_is_finite(x), size)
    yield DeviceRow("pick_logprobs", shape, lambda: logits_ops.pick_logprobs(x, at, ones, ids), size)
    yield DeviceRow("apply_bitmask", shape, lambda: logits_ops.apply_bitmask(x, words, at), words.numel() * 4)
    yield DeviceRow("penalize", shape, lambda: logits_ops.penalize(x, seen, at, ones, ones, ones), size)
    tokens = torch.randint(0, VOCAB, (rows, 1024), dtype=torch.int32, device=device)
    yield DeviceRow("count_tokens", f"{rows}x1", lambda: logits_ops.count_tokens(seen, tokens, at, at * 0, at * 0 + 1, at * 0, longest=1), 0)
    yield DeviceRow("count_tokens", f"{rows}x1024", lambda: logits_ops.count_tokens(seen, tokens, at, at * 0, at * 0 + 1024, at * 0, longest=1024), 4 * tokens.numel())
    yield DeviceRow("copy_rows", shape, lambda: logits_ops.copy_rows(x, at, x), 2 * size)
    yield DeviceRow("add_at", shape, lambda: logits_ops.add_at(x, at, at, ones), 0)
    yield DeviceRow("put_ids", shape, lambda: logits_ops.put_ids(at, at, at, ones > 0), 0)
    yield DeviceRow("top_tokens", f"20 of {shape}", lambda: logits_ops.top_tokens(x, 20), size)


def rows(device: Any) -> Iterator[DeviceRow]:
    """Made one at a time, so that only one row's operands take up memory."""
    for dtype in ("bfloat16", "fp8_e4m3"):
        for shape in ((1, 1, 8192), (64, 1, 4096), (256, 1, 1024), (1, 4096, 4096), (4, 512, 8192)):
            yield _attention(device, dtype, *shape)
    for format in ("bf16", "q8_0", "q4_0", "q4_1"):
        for tokens in (1, 16, 64, 512):
            yield _linear(device, format, tokens, HIDDEN, FFN)
    for tokens in (1, 64, 512):
        yield _linear(device, "bf16", tokens, HIDDEN, FFN, fixed_tiles=True)
    for tokens in (1, 256, 4096):
        yield from _pointwise(device, tokens)
    for count in (1, 256):
        yield from _logits(device, count)


def copy_bandwidth(device: Any) -> float:
    """Bytes a second of copying a gigabyte, read and written."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (triton.testing.do_bench(lambda: target.copy_(source)) * 1e-3)


def seconds_of(calls: Sequence[Callable[[], Any]], *, repeats: int = 10, replays: int = 7) -> list[float]:
    """Seconds of each call inside a graph, behind reading more than the caches hold; what that takes is measured alone and left out."""
    others = torch.zeros(1 << 26, dtype=torch.float32, device="cuda")

    def graph_of(call: Callable[[], Any] | None) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                others.sum()
                if call is not None:
                    call()
        return graph

    def seconds(graph: Any) -> float:
        found = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1e-3 / repeats)
        return statistics.median(found)

    for call in calls:  # compiled, and the library has chosen, before anything is captured
        call()
    others.sum()
    torch.cuda.synchronize()
    nothing = seconds(graph_of(None))
    return [seconds(graph_of(call)) - nothing for call in calls]


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m pagoda.kernels.triton.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="ops to measure, separated by commas")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: this measures kernels on one")
    ceiling, only = copy_bandwidth("cuda"), set(options.only.split(",")) - {""}
    print(f"{torch.cuda.get_device_name()}, triton {triton.__version__}, torch {torch.__version__}, copies {ceiling / 1e9:.0f} GB/s")
    for row in rows("cuda"):
        if only and row.op not in only:
            continue
        took = seconds_of([row.call])[0]
        share = 100 * row.nbytes / took / ceiling
        print(f"{row.op:16} {row.shape:40} {took * 1e6:10.1f} us {row.nbytes / took / 1e9:8.1f} GB/s {row.flops / took / 1e12:7.1f} TFLOP/s {share:4.0f} %")


if __name__ == "__main__":
    main()
