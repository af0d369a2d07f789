"""Inputs of every op for the conformance and invariance tests, and the tolerance each result is held to.

A case is a function of a random generator that returns (positional arguments, keyword arguments). `naive` is the same
computation done plainly in the kernel's own precision: the kernel may be at most twice as wrong as that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from pagoda.kernels import gguf_blocks, ops, rotation
from pagoda.kernels.kv import DTYPES, KvPlane, allocate_kv_plane, read_tokens
from pagoda.kernels.weight import FORMATS, GgmlRows, Weight, pack, storage_of, width_unit

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[np.random.Generator], Arguments]
    naive: Callable[..., np.ndarray] | None = None  # None: float32 all the way, held to float32 rounding
    exact: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def rounded(x_TK: np.ndarray, format: str) -> np.ndarray:
    """Activations as the format's product takes them; block formats round them in blocks of 32."""
    if format in ("f32", "bf16"):
        return bf16(x_TK) if format == "bf16" else x_TK
    if format == "i8":  # turned and turned back, so that the product is with the weights as they are
        turned = rotation.rotate(x_TK)
        scale = np.abs(turned).max(axis=1, keepdims=True) / 127
        scale[scale == 0] = 1
        return rotation.rotate(np.rint(turned / scale) * scale) / np.float32(x_TK.shape[1])
    blocks = x_TK.reshape(len(x_TK), -1, 32)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / (127 if format.endswith("_a8") else 32767)
    scale[scale == 0] = 1
    return (np.rint(blocks / scale) * scale).reshape(x_TK.shape).astype(np.float32)


def random_rows(rng: np.random.Generator, kind: str, n: int, k: int) -> np.ndarray:
    """Valid blocks of any type: random bytes, then finite scales where the format keeps half floats."""
    values, num_bytes = gguf_blocks.BLOCK_SIZES[kind]
    blocks = rng.integers(0, 256, (n * k // values, num_bytes), np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    if kind == "F16":
        blocks = normal(rng, n * k, 1).astype(np.float16).view(np.uint8)
    elif kind == "BF16":
        blocks = normal(rng, n * k, 1).astype(ml_dtypes.bfloat16).view(np.uint8)
    else:
        for at in halves.get(kind, (0,)):
            blocks[:, at : at + 2] = normal(rng, len(blocks), 1).astype(np.float16).view(np.uint8)
    return blocks.reshape(n, -1)


def weight(rng: np.random.Generator, format: str, n: int, k: int) -> Weight:
    """Random weights of about 1 / sqrt(k); formats without a quantizer get random blocks. k must suit the format."""
    if width_unit(format) < 256:
        return pack(format, [normal(rng, n, k) / np.sqrt(k)])
    kind = storage_of(format).upper()
    return pack(format, [GgmlRows(kind, random_rows(rng, kind, n, k))])


def width_for(format: str, k: int) -> int:
    """k, or what is next to it that the format can be of."""
    return -(-k // width_unit(format)) * width_unit(format)


def naive_linear(x: np.ndarray, w: Weight, bias: np.ndarray | None = None, *, residual: np.ndarray | None = None, **_: Any) -> np.ndarray:
    y = rounded(x, w.format) @ w.dense.T
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def linear_case(format: str, rows: int, k: int, n: int, extras: str) -> Case:
    k = width_for(format, k)

    def make(rng: np.random.Generator) -> Arguments:
        wide = normal(rng, rows, k + 7)
        x = wide[:, 3 : 3 + k]  # a column slice
        bias = normal(rng, n) if "b" in extras else None
        kwargs: dict[str, Any] = {"residual": normal(rng, rows, n)} if "r" in extras else {}
        if "o" in extras:
            kwargs["out"] = np.zeros((rows, n + 5), np.float32)[:, 2 : 2 + n]
        return (x, weight(rng, format, n, k), bias), kwargs

    return Case("linear", f"{format}-{rows}x{k}x{n}{'-' if extras else ''}{extras}", make, naive_linear)


def fill_with_nan(cache: KvPlane) -> None:
    """Bytes that are NaN as floats: numbers, or the scales of an int8 cache."""
    cache.k.view(np.uint8)[...] = 255
    cache.v.view(np.uint8)[...] = 255


def filled_cache(rng: np.random.Generator, dtype: str, *, block_size: int, heads: int, dim: int, lens: list[int]) -> tuple[KvPlane, np.ndarray]:
    """A plane with random keys and values for sequences of these lengths, at scattered pages, NaN everywhere else."""
    pages = [-(-n // block_size) for n in lens]
    cache = allocate_kv_plane(dtype=dtype, block_size=block_size, num_blocks=sum(pages) + 2, num_kv_heads=heads, head_dim=dim)
    fill_with_nan(cache)
    order = rng.permutation(sum(pages) + 2).astype(np.int32)
    table = np.full((len(lens), max(pages) + 1), 0, np.int32)
    for s, n in enumerate(lens):
        table[s, : pages[s]] = order[sum(pages[:s]) : sum(pages[: s + 1])]
        at = np.arange(n)
        slots = table[s, at // block_size].astype(np.int64) * block_size + at % block_size
        ops.kv_write(normal(rng, n, heads * dim), normal(rng, n, heads * dim), cache, slots)
    return cache, table


def attention_with_rounded_queries(
    q: np.ndarray, cache: KvPlane, table: np.ndarray, starts: np.ndarray, lens: np.ndarray, *, scale: float, head_dim: int, window: int, soft_cap: float
) -> np.ndarray:
    """Attention whose queries are integers of 8 bits and one scale a head, as they are where bytes are multiplied."""
    rows = []
    for s, length in enumerate(lens):
        k_JHD, v_JHD = read_tokens(cache, table[s], int(length))
        x_QHGD = q[starts[s] : starts[s + 1]].reshape(-1, cache.num_kv_heads, q.shape[1] // head_dim // cache.num_kv_heads, head_dim)
        step_QHG1 = np.abs(x_QHGD).max(axis=3, keepdims=True) / 127
        scores = np.einsum("qhgd,jhd->qhgj", np.rint(x_QHGD / step_QHG1) * step_QHG1, k_JHD) * scale
        scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
        at, key = np.arange(length - len(x_QHGD), length)[:, None], np.arange(length)[None, :]
        seen = (key <= at) & (key > at - (window or length + 1))
        scores = np.where(seen[:, None, None, :], scores, -np.inf)
        p = np.exp(scores - scores.max(axis=3, keepdims=True))
        rows.append((np.einsum("qhgj,jhd->qhgd", p, v_JHD) / p.sum(axis=3, keepdims=True)).reshape(len(x_QHGD), -1))
    return np.concatenate(rows)


def attention_case(dtype: str, name: str, *, lens: list[int], queries: list[int], heads: int, group: int, dim: int, block_size: int = 16, window: int = 0, cap: float = 0.0) -> Case:
    def make(rng: np.random.Generator) -> Arguments:
        cache, table = filled_cache(rng, dtype, block_size=block_size, heads=heads, dim=dim, lens=lens)
        q = normal(rng, sum(queries), heads * group * dim)
        starts = np.cumsum([0, *queries]).astype(np.int32)
        args = (q, cache, table, starts, np.array(lens, np.int32))
        return args, {"scale": dim**-0.5, "head_dim": dim, "window": window, "soft_cap": cap}

    def naive(q: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        from pagoda.kernels.table import backend

        with backend("reference"):
            return np.asarray(ops.attention(bf16(q), *args, **kwargs))

    naives = {"float32": None, "bfloat16": naive, "int8": attention_with_rounded_queries}
    return Case("attention", f"{dtype}-{name}", make, naives[dtype])


def rope_table(positions: int, width: int) -> np.ndarray:
    angles = np.outer(np.arange(positions), 10000.0 ** (-np.arange(width // 2) / (width // 2)))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rope_case(name: str, heads: int, dim: int, width: int, index: Any) -> Case:
    def make(rng: np.random.Generator) -> Arguments:
        positions = rng.integers(0, 50, 5).astype(index)
        return (normal(rng, 5, heads * dim), positions, rope_table(50, width)), {"head_dim": dim}

    return Case("rope", name, make)


def sample_inputs(rng: np.random.Generator, rows: int, vocab: int, *, spread: float = 3.0) -> tuple[np.ndarray, ...]:
    """Logits with ties and masked tokens, and parameters that mix every kind of row."""
    logits = np.round(normal(rng, rows, vocab) * spread * 8) / 8
    logits[rng.random((rows, vocab)) < 0.05] = -np.inf
    temperature = rng.choice(np.array([0.0, 0.3, 0.8, 1.0, 1.7], np.float32), rows)
    top_k = rng.choice(np.array([-1, 0, 1, 2, 5, 40, vocab, vocab + 3], np.int32), rows)
    top_p = rng.choice(np.array([0.0, 0.1, 0.5, 0.9, 0.999, 1.0], np.float32), rows)
    min_p = rng.choice(np.array([0.0, 0.0, 0.05, 0.3], np.float32), rows)
    seed = rng.integers(0, 2**64, rows, np.uint64)
    position = rng.integers(0, 2**40, rows, np.int64)
    return logits, temperature, top_k, top_p, min_p, seed, position


def masked_inputs(rng: np.random.Generator, rows: int, vocab: int, *, spread: float = 3.0) -> tuple[np.ndarray, ...]:
    """Masks from nearly empty to nearly full, of rows in any order; some rows cannot be drawn from, some only look so."""
    logits, *parameters = sample_inputs(rng, rows, vocab, spread=spread)
    logits[0, vocab // 2], logits[1, 0], logits[2, :] = np.nan, np.inf, -np.inf
    bits = rng.random((rows, vocab)) < rng.choice([0.02, 0.3, 0.5, 0.97], (rows, 1))
    bits[3:7] = [[0], [1], [0], [1]]
    bits[5, vocab - 1] = 1
    bits[7, ::16] = 1
    mask = np.zeros((rows, (vocab + 31) // 32 * 4), np.uint8)
    mask[:, : (vocab + 7) // 8] = np.packbits(bits, axis=1, bitorder="little")
    return logits, rng.permutation(rows), mask, *parameters


def _cases() -> list[Case]:
    cases = [linear_case(f, rows, 64, 48, "") for f in FORMATS for rows in (1, 2, 3, 4, 7, 13)]
    cases += [linear_case(f, 6, 96, 33, "bro") for f in FORMATS]
    cases += [linear_case(f, 2, 576, 192, "r") for f in FORMATS]
    cases += [linear_case(f, 5, 37, 20, "b") for f in ("f32", "bf16")]
    cases += [linear_case(f, 70, 64, 128, "b") for f in FORMATS]
    for format in FORMATS:
        cases.append(Case("embedding", format, lambda rng, f=format: ((rng.integers(0, 50, 9), weight(rng, f, 50, width_for(f, 64))), {"scale": 1.5})))
    cases.append(Case("embedding", "bf16-odd", lambda rng: ((rng.integers(0, 7, 3).astype(np.int32), weight(rng, "bf16", 7, 9)), {})))
    for width, group in ((64, 64), (24, 24), (192, 64), (40, 8), (576, 576)):
        cases.append(Case("rms_norm", f"{width}-by-{group}", lambda rng, w=width, g=group: ((normal(rng, 5, w), normal(rng, g)), {"eps": 1e-5})))
    cases.append(Case("rms_norm", "residual", lambda rng: ((normal(rng, 5, 72), normal(rng, 72)), {"eps": 1e-6, "residual": normal(rng, 5, 72)})))
    cases += [rope_case("full", 3, 64, 64, np.int64), rope_case("part", 2, 80, 32, np.int32), rope_case("tiny", 4, 8, 8, np.int64)]
    for kind in ("silu", "gelu_tanh", "gelu", "relu"):
        cases.append(Case("act_and_mul", kind, lambda rng, k=kind: ((normal(rng, 4, 70) * 4, k), {})))
    cases.append(Case("add", "ragged", lambda rng: ((normal(rng, 4, 37), normal(rng, 4, 37)), {}), exact=True))
    cases.append(Case("scale", "ragged", lambda rng: ((normal(rng, 4, 37), 0.7), {}), exact=True))
    cases.append(Case("soft_cap", "ragged", lambda rng: ((normal(rng, 4, 37) * 60, 30.0), {})))
    cases.append(Case("gather_rows", "int64", lambda rng: ((normal(rng, 9, 21), np.array([8, 0, 3, 3])), {}), exact=True))
    cases.append(Case("row_logsumexp", "ragged", lambda rng: ((normal(rng, 4, 1003) * 9,), {})))
    cases.append(Case("row_is_finite", "mixed", lambda rng: ((_odd_rows(rng),), {}), exact=True))
    cases.append(Case("empty_like_rows", "wider", lambda rng: ((normal(rng, 4, 5), 9), {})))
    for vocab in (5, 300, 5000):
        cases.append(Case("sample", f"vocab{vocab}", lambda rng, v=vocab: (sample_inputs(rng, 60, v), {}), exact=True))
    for vocab in (5, 16, 300, 5000):
        cases.append(Case("sample_masked", f"vocab{vocab}", lambda rng, v=vocab: (masked_inputs(rng, 60, v), {}), exact=True))
    for dtype in DTYPES:
        mixed = {"lens": [70, 1, 33, 130], "queries": [1, 1, 33, 70], "heads": 2, "group": 3, "dim": 64}
        cases += [
            Case("kv_write", dtype, lambda rng, d=dtype: (_kv_write_arguments(rng, d), {}), exact=True),
            attention_case(dtype, "mixed", **mixed),
            attention_case(dtype, "window", **mixed, window=20),
            attention_case(dtype, "cap", **mixed, cap=5.0),
            attention_case(dtype, "tiny-heads", lens=[40, 9], queries=[40, 2], heads=4, group=2, dim=8, block_size=32),
            attention_case(dtype, "long", lens=[700, 1300, 513, 30], queries=[1, 2, 40, 30], heads=2, group=3, dim=16),
            attention_case(dtype, "long-one", lens=[1500], queries=[1], heads=3, group=3, dim=64),
            attention_case(dtype, "long-window", lens=[1400, 700], queries=[1, 90], heads=2, group=2, dim=32, window=600),
            attention_case(dtype, "dim80", lens=[50, 9], queries=[3, 9], heads=1, group=5, dim=80),
            attention_case(dtype, "dim256", lens=[65], queries=[4], heads=1, group=2, dim=256, window=40, cap=20.0),
        ]
    return cases


def _odd_rows(rng: np.random.Generator) -> np.ndarray:
    x = normal(rng, 6, 50)
    x[1, 7], x[2, 49], x[3, 3], x[4, :] = np.nan, np.inf, -np.inf, -np.inf
    return x


def _kv_write_arguments(rng: np.random.Generator, dtype: str) -> tuple[Any, ...]:
    cache = allocate_kv_plane(dtype=dtype, block_size=32, num_blocks=4, num_kv_heads=2, head_dim=20)
    cache.k.view(np.uint8)[...] = cache.v.view(np.uint8)[...] = 7
    slots = rng.permutation(128)[:25]
    slots[[3, 9]] = -1
    return normal(rng, 25, 40), normal(rng, 25, 40), cache, slots


CASES = _cases()
