"""How fast each op is, beside what this machine can do: GB/s and GFLOP/s per op and shape.

    python -m pagoda.kernels.bench [--threads N] [--isa NAME] [--only linear,attention] [--shape q4_1] [--roofline]

Each row runs as a recorded program of many copies of one op, so that what is timed is the kernel and its barriers, not
Python. Weights are rotated over more memory than the caches hold, as a model's layers are.
"""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pagoda.kernels import gguf_blocks, ops
from pagoda.kernels.cpu import library
from pagoda.kernels.kv import DTYPES, allocate_kv_plane, bytes_per_block
from pagoda.kernels.memory import allocate
from pagoda.kernels.record import Recorder
from pagoda.kernels.weight import FORMATS, GgmlRows, Weight, pack, packed_nbytes, storage_of, width_unit

__all__ = ["ROWS", "Row", "main", "measure"]

COLD_BYTES = 128 << 20  # more than a last-level cache, so that a row reads its operands from memory
Array = Any


@dataclass(frozen=True)
class Row:
    """One line of the table. `build` records `copies` calls; bytes and flops are of one call."""

    op: str
    shape: str
    copies: int
    rows: int
    build: Callable[[Recorder, int], list[Array]]
    nbytes: float
    flops: float


def _x(recorder: Recorder, rows: int, cols: int) -> Array:
    return recorder.input(np.random.default_rng(0).standard_normal((rows, cols), np.float32), rows="T")


def _weights(format: str, n: int, k: int, copies: int) -> list[Weight]:
    rng = np.random.default_rng(1)
    if width_unit(format) == 256:
        kind = storage_of(format).upper()
        values, nbytes = gguf_blocks.BLOCK_SIZES[kind]
        first = pack(format, [GgmlRows(kind, rng.integers(0, 60, (n, k // values * nbytes), np.uint8))])
    else:
        first = pack(format, [rng.standard_normal((n, k), np.float32)])
    return [first, *(Weight(format, (n, k), _copy(first.data)) for _ in range(copies - 1))]


def _copy(data: np.ndarray) -> np.ndarray:
    """On huge pages, as the loader's weights are."""
    made: np.ndarray = allocate(data.nbytes).view(data.dtype).reshape(data.shape)
    made[...] = data
    return made


def _linear(format: str, rows: int, k: int, n: int) -> Row:
    nbytes = packed_nbytes(format, n, k)
    copies = max(2, min(64, int(COLD_BYTES / nbytes))) if rows <= 32 else 2

    def build(recorder: Recorder, times: int) -> list[Array]:
        x, weights = _x(recorder, rows, k), _weights(format, n, k, times)
        return [ops.linear(x, w) for w in weights]

    return Row("linear", f"{format} {rows}x{k}x{n}", copies, rows, build, nbytes + 4 * rows * (n + k), 2.0 * rows * k * n)


def _attention(dtype: str, seqs: int, queries: int, context: int) -> Row:
    heads, group, dim, block = 3, 3, 64, 16
    rows, pages = seqs * queries, -(-context // block)
    pairs = seqs * sum(range(context - queries + 1, context + 1))

    def build(recorder: Recorder, times: int) -> list[Array]:
        q, out = _x(recorder, rows, heads * group * dim), []
        table = np.arange(seqs * pages, dtype=np.int32).reshape(seqs, pages)
        starts = (np.arange(seqs + 1) * queries).astype(np.int32)
        lens = recorder.input(np.full(seqs, context, np.int32), rows="S")
        for _ in range(times):
            cache = allocate_kv_plane(dtype=dtype, block_size=block, num_blocks=seqs * pages, num_kv_heads=heads, head_dim=dim)
            cache.k.view(np.uint8)[...] = cache.v.view(np.uint8)[...] = 63  # about 0.75 in every type, scales of int8 included
            out.append(ops.attention(q, cache, recorder.input(table, rows="S"), starts, lens, scale=0.125, head_dim=dim))
        return out

    nbytes = pages * seqs * bytes_per_block(dtype=dtype, block_size=block, num_kv_heads=heads, head_dim=dim) + 8 * rows * heads * group * dim
    copies = max(2, min(64, int(COLD_BYTES / nbytes))) if queries == 1 else 1
    return Row("attention", f"{dtype} {seqs} seqs x {queries} of {context}", copies, rows, build, nbytes, 4.0 * dim * heads * group * pairs)


def _simple(op: str, shape: str, rows: int, call: Callable[[Recorder], Callable[[], Array]], nbytes: float, flops: float = 0) -> Row:
    def build(recorder: Recorder, times: int) -> list[Array]:
        once = call(recorder)
        return [y for y in (once() for _ in range(times)) if y is not None]

    return Row(op, shape, 30, rows, build, nbytes, flops)


def _pointwise(rows: int) -> Iterator[Row]:
    size = 4 * rows * 576

    def on(width: int, f: Callable[[Array], Array]) -> Callable[[Recorder], Callable[[], Array]]:
        def call(recorder: Recorder) -> Callable[[], Array]:
            x = _x(recorder, rows, width)
            return lambda: f(x)

        return call

    weight, angles = np.ones(576, np.float32), np.ones((64, 64), np.float32)
    positions, zeros = np.zeros(rows, np.int64), np.zeros(rows, np.int32)
    yield _simple("rms_norm", f"{rows}x576", rows, on(576, lambda x: ops.rms_norm(x, weight, eps=1e-5)), 2 * size)
    yield _simple("add", f"{rows}x576", rows, on(576, lambda x: ops.add(x, x)), 2 * size)
    yield _simple("scale", f"{rows}x576", rows, on(576, lambda x: ops.scale(x, 0.5)), 2 * size)
    yield _simple("soft_cap", f"{rows}x576", rows, on(576, lambda x: ops.soft_cap(x, 30.0)), 2 * size)
    for kind in ("silu", "gelu_tanh"):
        f = _bind_activation(kind)
        yield _simple("act_and_mul", f"{kind} {rows}x3072", rows, on(3072, f), 12 * rows * 1536)
    rope = lambda x: ops.rope(x, x.recorder.input(positions, rows="T"), angles, head_dim=64)  # noqa: E731
    yield _simple("rope", f"{rows}x576", rows, on(576, rope), 2 * size)
    gather = lambda x: ops.gather_rows(x, x.recorder.input(zeros, rows="T"))  # noqa: E731
    yield _simple("gather_rows", f"{rows}x576", rows, on(576, gather), 2 * size)
    yield _simple("empty_like_rows", f"{rows}x576", rows, on(576, lambda x: ops.add(x, x, out=ops.empty_like_rows(x, 576))), 2 * size)


def _bind_activation(kind: str) -> Callable[[Array], Array]:
    return lambda x: ops.act_and_mul(x, kind)


def _kv_write(rows: int, dtype: str) -> Row:
    def call(recorder: Recorder) -> Callable[[], Array]:
        cache = allocate_kv_plane(dtype=dtype, block_size=16, num_blocks=1 + rows // 16, num_kv_heads=3, head_dim=64)
        x, slots = _x(recorder, rows, 192), recorder.input(np.arange(rows), rows="T")
        return lambda: ops.kv_write(x, x, cache, slots)

    return _simple("kv_write", f"{dtype} {rows}x192", rows, call, 2 * rows * 192 * (4 + DTYPES[dtype].itemsize))


def _embedding(rows: int, format: str) -> Row:
    def call(recorder: Recorder) -> Callable[[], Array]:
        ids = recorder.input(np.arange(rows) * 7 % 4096, rows="T")
        table = _weights(format, 4096, 576, 1)[0]
        return lambda: ops.embedding(ids, table)

    return _simple("embedding", f"{format} {rows}x576", rows, call, rows * 576 * 5)


def _logits(rows: int) -> Iterator[Row]:
    def on(f: Callable[[Array], Array]) -> Callable[[Recorder], Callable[[], Array]]:
        def call(recorder: Recorder) -> Callable[[], Array]:
            x = _x(recorder, rows, 49152)
            return lambda: f(x)

        return call

    def column(x: Array, value: float, dtype: Any) -> Array:
        return x.recorder.input(np.full(rows, value, dtype), rows="T")

    def columns(x: Array, temperature: float, top_k: int, top_p: float) -> list[Array]:
        parameters = ((temperature, np.float32), (top_k, np.int32), (top_p, np.float32), (0, np.float32), (1, np.uint64), (2, np.int64))
        return [column(x, value, kind) for value, kind in parameters]

    def sample(x: Array, temperature: float, top_k: int, top_p: float) -> Array:
        return ops.sample(x, *columns(x, temperature, top_k, top_p))

    def masked(x: Array, temperature: float, byte: int) -> Array:
        mask = x.recorder.input(np.full((rows, 49152 // 8), byte, np.uint8), rows="T")
        return ops.sample_masked(x, x.recorder.input(np.arange(rows), rows="T"), mask, *columns(x, temperature, 0, 1.0))

    size = 4 * rows * 49152
    yield _simple("row_logsumexp", f"{rows}x49152", rows, on(ops.row_logsumexp), size)
    yield _simple("row_is_finite", f"{rows}x49152", rows, on(ops.row_is_finite), size)
    yield _simple("sample", f"greedy {rows}x49152", rows, on(lambda x: sample(x, 0.0, 0, 1.0)), size)
    yield _simple("sample", f"random {rows}x49152", rows, on(lambda x: sample(x, 1.0, 0, 1.0)), size)
    yield _simple("sample", f"top_k 40, top_p 0.9 {rows}x49152", rows, on(lambda x: sample(x, 1.0, 40, 0.9)), size)
    yield _simple("sample", f"top_p 0.9 {rows}x49152", rows, on(lambda x: sample(x, 1.0, 0, 0.9)), size)
    yield _simple("sample_masked", f"greedy, half allowed {rows}x49152", rows, on(lambda x: masked(x, 0.0, 0x5A)), size)
    yield _simple("sample_masked", f"random, half allowed {rows}x49152", rows, on(lambda x: masked(x, 1.0, 0x5A)), size)
    yield _simple("sample_masked", f"random, all allowed {rows}x49152", rows, on(lambda x: masked(x, 1.0, 0xFF)), size)


def _rows() -> list[Row]:
    usual = ((576, 3072), (1536, 576))
    shapes = {1: usual, 16: usual, 32: usual, 256: ((512, 3072), (1536, 576))}
    rows = [_linear(f, t, k, n) for f in FORMATS for k, n in shapes[width_unit(f)] for t in (1, 4, 32, 512)]
    rows += [_linear("q8_0", t, 576, 49152) for t in (1, 32)]
    for dtype in DTYPES:
        decode = ((1, 1, 128), (1, 1, 2048), (1, 1, 8192), (16, 1, 256), (32, 1, 192))
        rows += [_attention(dtype, *s) for s in (*decode, (1, 512, 512), (1, 2048, 2048))]
        rows.append(_kv_write(32, dtype))
    for t in (1, 32, 512):
        rows += list(_pointwise(t))
    rows += [_embedding(32, f) for f in ("bf16", "q8_0", "i8")]
    for t in (1, 32):
        rows += list(_logits(t))
    return rows


ROWS = _rows()


def measure(row: Row, *, seconds: float = 0.2) -> float:
    """Seconds one call takes: the median over runs of the recorded program, divided by the calls in it."""
    seqs = int(row.shape.split()[1]) if row.op == "attention" else 1
    recorder = Recorder(max_rows={"T": row.rows, "S": seqs})
    program = recorder.finish(outputs=row.build(recorder, row.copies))
    program.run(T=row.rows, S=seqs)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        program.run(T=row.rows, S=seqs)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] / row.copies


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m pagoda.kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, help="threads, the caller included (default: all)")
    parser.add_argument("--isa", help="instruction set (default: the best)")
    parser.add_argument("--only", default="", help="ops to measure, separated by commas")
    parser.add_argument("--shape", default="", help="only rows whose shape has this in it, as `q4_1 512`")
    parser.add_argument("--roofline", action="store_true", help="first measure what the machine can do (needs a compiler)")
    options = parser.parse_args(arguments)
    lib = library.default()
    if options.isa:
        lib.set_isa(options.isa)
    if options.threads:
        lib.set_threads(options.threads)
    print(f"isa {lib.isa}, {lib.num_threads} threads")
    if options.roofline:
        build = runpy.run_path(str(Path(__file__).parents[1] / "csrc" / "build.py"))
        print(subprocess.run([build["build_roofline"](), str(lib.num_threads)], capture_output=True, text=True, check=True).stdout)
    only = set(options.only.split(",")) - {""}
    for row in ROWS:
        if (only and row.op not in only) or options.shape not in row.shape:
            continue
        took = measure(row)
        rates = f"{row.nbytes / took / 1e9:8.1f} GB/s {row.flops / took / 1e9:8.1f} GFLOP/s"
        print(f"{row.op:16} {row.shape:36} {took * 1e6:10.1f} us {rates}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
