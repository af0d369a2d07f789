"""The public surface of the kernels: every operation a model forward or a sampler is made of.

Shape letters: T tokens of the step, S sequences, R rows that need logits, D/K/N/F widths, V vocabulary, B block-table
width, H heads, P positions. Activations are float32, 2-D, row-major; the columns of a row are contiguous, so a
column slice `x[:, a:b]` of a wider array is a valid operand. `out` receives the result and is returned; without it
a new array is. Results never depend on how many rows are computed together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from pagoda.kernels import reference as _reference  # registers the reference implementations
from pagoda.kernels.cpu import ops as _cpu  # registers the native and the recording implementations
from pagoda.kernels.table import lookup

if TYPE_CHECKING:
    from pagoda.kernels.kv import KvPlane
    from pagoda.kernels.weight import Weight

__all__ = [
    "act_and_mul",
    "add",
    "attention",
    "embedding",
    "empty_like_rows",
    "gather_rows",
    "kv_write",
    "linear",
    "rms_norm",
    "rope",
    "row_is_finite",
    "row_logsumexp",
    "sample",
    "sample_masked",
    "scale",
    "soft_cap",
]

assert _reference and _cpu
Array: TypeAlias = Any  # numpy array, torch tensor or SymArray


def embedding(ids_T: Array, table: Weight, *, scale: float = 1.0) -> Array:
    """x[t] = table[ids[t]] * scale. ids int32 or int64 in [0, N); rows are read from the packed table. -> x_TK float32."""
    return lookup("embedding", ids_T)(ids_T, table, scale=scale)


def rms_norm(x_TD: Array, weight_G: Array, *, eps: float, residual: Array | None = None, out: Array | None = None) -> Array:
    """y = x / sqrt(mean(x^2) + eps) * weight over each group of G = len(weight) columns; G divides D.

    G = D is the usual norm; G = head_dim normalises every head. `out` may be `x_TD`. With `residual` (T, D) x + residual takes
    the place of x, and is left in `residual`.
    """
    return lookup("rms_norm", x_TD)(x_TD, weight_G, eps=eps, residual=residual, out=out)


def linear(
    x_TK: Array, weight: Weight, bias_N: Array | None = None, *, residual: Array | None = None, out: Array | None = None
) -> Array:
    """y = x W^T + bias + residual. W is (N, K) packed. `out` may be a column slice, or `residual` itself. -> y_TN float32.

    Activations are rounded to bfloat16 for bf16 weights; for block formats to integers in blocks of 32, of 16 bits, or of 8
    where the format ends in `_a8`.
    """
    return lookup("linear", x_TK)(x_TK, weight, bias_N, residual=residual, out=out)


def rope(x_TD: Array, positions_T: Array, cos_sin_PR: Array, *, head_dim: int, out: Array | None = None) -> Array:
    """Rotates pairs (i, i + R/2) of every head by the angle of its position.

    cos_sin_PR float32: row p holds cos in [0, R/2) and sin in [R/2, R). R <= head_dim; columns R.. pass through.
    y[i] = x[i] cos - x[i+R/2] sin;  y[i+R/2] = x[i+R/2] cos + x[i] sin. `out` may be `x_TD`.
    """
    return lookup("rope", x_TD)(x_TD, positions_T, cos_sin_PR, head_dim=head_dim, out=out)


def kv_write(k_TD: Array, v_TD: Array, cache: KvPlane, slots_T: Array) -> None:
    """Stores row t of k and v (num_kv_heads * head_dim wide) at slot = block_id * block_size + offset.

    slots int32 or int64; a negative slot is skipped. Changes `cache` in place.
    """
    lookup("kv_write", k_TD)(k_TD, v_TD, cache, slots_T)


def attention(
    q_TD: Array,
    cache: KvPlane,
    block_table_SB: Array,
    query_start_S1: Array,
    seq_lens_S: Array,
    *,
    scale: float,
    head_dim: int,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks_H: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Causal attention of each query over the paged keys of its own sequence. -> o_TD float32.

    Queries of sequence s are rows query_start[s] .. query_start[s+1], the i-th of which sits at position
    p = seq_lens[s] - (number of its queries) + i and sees keys j <= p, and j > p - window when window > 0.
    Scores are scale * q.k, soft-capped to cap * tanh(s / cap) when soft_cap > 0. Query head h reads key-value head
    h // (heads / cache.num_kv_heads). Tables are int32; key j of s is at block_table[s, j // block_size].
    `sinks_H`: a score per head that joins the sum of the softmax and has no value (no native kernel has it).
    """
    return lookup("attention", q_TD)(
        q_TD,
        cache,
        block_table_SB,
        query_start_S1,
        seq_lens_S,
        scale=scale,
        head_dim=head_dim,
        window=window,
        soft_cap=soft_cap,
        sinks_H=sinks_H,
        out=out,
    )


def act_and_mul(x_T2F: Array, kind: str, *, out: Array | None = None) -> Array:
    """y = act(x[:, :F]) * x[:, F:]; kind is "silu", "gelu_tanh", "gelu" or "relu". -> y_TF. `out` may be x[:, :F]."""
    return lookup("act_and_mul", x_T2F)(x_T2F, kind, out=out)


def add(x_TD: Array, y_TD: Array, *, out: Array | None = None) -> Array:
    """z = x + y. `out` may be either operand."""
    return lookup("add", x_TD)(x_TD, y_TD, out=out)


def scale(x_TD: Array, factor: float, *, out: Array | None = None) -> Array:
    """y = x * factor. `out` may be `x_TD`."""
    return lookup("scale", x_TD)(x_TD, factor, out=out)


def soft_cap(x_TD: Array, cap: float, *, out: Array | None = None) -> Array:
    """y = cap * tanh(x / cap), cap > 0. `out` may be `x_TD`."""
    return lookup("soft_cap", x_TD)(x_TD, cap, out=out)


def gather_rows(x_TD: Array, idx_R: Array) -> Array:
    """y[r] = x[idx[r]]; idx int32 or int64. -> y_RD."""
    return lookup("gather_rows", x_TD)(x_TD, idx_R)


def empty_like_rows(x_TD: Array, cols: int) -> Array:
    """An uninitialised float32 array with the rows of `x_TD` and `cols` columns, for ops to write slices of."""
    return lookup("empty_like_rows", x_TD)(x_TD, cols)


def row_logsumexp(logits_RV: Array) -> Array:
    """log(sum(exp(row))), accumulated in float64 in one order per row. -> float32 R; -inf for a row of -inf."""
    return lookup("row_logsumexp", logits_RV)(logits_RV)


def row_is_finite(logits_RV: Array) -> Array:
    """False for rows holding NaN or +inf, or nothing above -inf. -inf alone is what masks write. -> bool R."""
    return lookup("row_is_finite", logits_RV)(logits_RV)


def sample(
    logits_RV: Array,
    temperature_R: Array,
    top_k_R: Array,
    top_p_R: Array,
    min_p_R: Array,
    seed_R: Array,
    position_R: Array,
) -> Array:
    """One token id per row: a pure function of (logits, parameters, seed, position). -> int32 R.

    temperature 0: the largest logit, the lowest id on ties. Otherwise p = softmax(logits / temperature), then
    min_p keeps p >= min_p * max(p); top_k (<= 0: all) keeps the k largest, lower ids first on ties; top_p keeps the
    shortest head of (p descending, id ascending) whose share of what is left reaches top_p, at least one token.
    u in [0, 1) is the first 53 bits of Philox4x32-10 with key = seed and counter = position; the answer is the first
    kept id in vocabulary order whose cumulative p exceeds u. All sums are float64. A row with NaN or +inf, or with nothing
    above -inf, gives -1. Types: float32 x3 (temperature,
    top_p, min_p), int32 top_k, uint64 seed, int64 position. A temperature below 0 says that nobody will read the row's answer:
    it may be any id or -1.
    """
    return lookup("sample", logits_RV)(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R)


def sample_masked(
    logits_RV: Array,
    row_M: Array,
    mask_MB: Array,
    temperature_M: Array,
    top_k_M: Array,
    top_p_M: Array,
    min_p_M: Array,
    seed_M: Array,
    position_M: Array,
) -> Array:
    """`sample` of rows row[m], as if logits whose bit in mask m is 0 were -inf. -> int32 M. Changes no operand.

    Bit v of a mask is bit v % 8 of its byte v / 8; mask uint8, B >= ceil(V / 8), row int32 or int64. A row with NaN or +inf gives -1,
    allowed or not, and so does one whose mask allows nothing above -inf. Bit for bit the answers of `sample` on such a copy.
    """
    found = lookup("sample_masked", logits_RV)
    return found(logits_RV, row_M, mask_MB, temperature_M, top_k_M, top_p_M, min_p_M, seed_M, position_M)
