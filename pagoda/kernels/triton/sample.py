"""One token per row without sorting: thresholds are found by counting and by adding up, in a fixed number of rounds.

What min_p, top_k and top_p keep is always a head of one order, logits descending and ids ascending. Such a head is a threshold,
and how many of the logits that equal it are kept, lowest ids first:

    kept   logit > threshold, or logit = threshold and among the first `ties` of these

A threshold is searched among the keys of floats, integers in the order of their floats: 8 candidates a round divide
what is left of 2^32 by 8, so 11 rounds at most find the largest key at and above which there are enough tokens (top_k) or
probability (top_p). Every thread adds up its own tokens and the row is summed once a round. min_p is a bound on one float, and needs no
pass at all.

Numbers are those of the CPU: Philox4x32-10 of (seed, position), float64 probabilities and sums. One program has one row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pagoda.kernels.table import implements
from pagoda.kernels.triton.launch import arch_of, check_rows, index, launch

__all__ = ["key_of", "row_is_finite", "row_logsumexp", "sample"]

Array = Any
_BLOCK, _WARPS = 2048, 16
_SEARCHED = 1024  # logits compared with all candidates at a time, and on AMD the block: it has no scalar registers for more
NOWHERE = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(-0x80000000)
WAYS = tl.constexpr(8)


@triton.jit
def _uniform(seed, position):
    """The first 53 bits of Philox4x32-10 with key `seed` and counter `position`, as a fraction: float64 in [0, 1)."""
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    c0, c1 = position & 0xFFFFFFFF, position >> 32
    c2, c3 = seed & 0, seed & 0
    for _ in tl.static_range(10):
        first = c0 * 0xD2511F53
        second = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ key0, second & 0xFFFFFFFF, (first >> 32) ^ c3 ^ key1, first & 0xFFFFFFFF
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    bits = (c0 >> 5) * 67108864 + (c1 >> 6)
    return bits.to(tl.float64) / 9007199254740992.0


@triton.jit
def key_of(x):
    """An integer in the order of floats: -0 and 0 are equal, as logits are."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 0, bits, LOWEST - bits)


@triton.jit
def _float_of(key):
    bits = tl.where(key >= 0, key, LOWEST - key)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _exp2(t):
    """2^t for t <= 0 in float64, to 12 digits: 2^n (1 + f (ln 2 + f ...)), the Taylor polynomial of 2^f with n = round(t), |f| <= 1/2.

    A third of the instructions of the library's exponential; GPUs have few units for float64.
    """
    t = tl.maximum(t, -1000.0)
    n = t + 6755399441055744.0  # 1.5 * 2^52: the integer is in the last bits
    f = t - (n - 6755399441055744.0)
    y = f * 7.054911620801123e-09 + 1.0178086009239699e-07
    y = y * f + 1.321548679014431e-06
    y = y * f + 1.5252733804059840e-05
    y = y * f + 1.5403530393381610e-04
    y = y * f + 1.3333558146428443e-03
    y = y * f + 9.6181291076284772e-03
    y = y * f + 5.5504108664821580e-02
    y = y * f + 2.4022650695910072e-01
    y = y * f + 6.9314718055994531e-01
    y = y * f + 1.0
    shifted = y.to(tl.int64, bitcast=True) + (n.to(tl.int64, bitcast=True) << 52)
    return tl.where(t > -1000.0, shifted.to(tl.float64, bitcast=True), 0.0)


@triton.jit
def _weight(x, best, heat):
    """The probability of a logit, up to a common factor that makes the largest 1. `heat` is log2(e) / temperature."""
    return _exp2((x.to(tl.float64) - best) * heat)


@triton.jit
def _load(row, col, width):
    return tl.load(row + col, mask=col < width, other=-float("inf")).to(tl.float32)


@triton.jit
def _best_of(row, width, BLOCK: tl.constexpr):
    """-> the largest logit, its lowest id, and whether a row holds NaN or +inf."""
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    top_id = tl.zeros((BLOCK,), tl.int32)
    is_bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, index(width), BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = _load(row, col, width)
        is_bad = is_bad | ((x != x) | (x == float("inf"))).to(tl.int32)
        top_id = tl.where(x > top, col, top_id)
        top = tl.where(x > top, x, top)
    best = tl.max(top, axis=0)
    return best, tl.min(tl.where(top == best, top_id, NOWHERE), axis=0), tl.max(is_bad, axis=0)


@triton.jit
def _lowest_key(best, temperature, min_p, best_key):
    """The lowest key whose probability is at least `min_p` times the largest."""
    low = best_key * 0 + LOWEST
    high = best_key
    while high - low > 1:
        middle = (low + high) >> 1
        x = tl.maximum(_float_of(middle), -3.4028234663852886e38)  # keys below the lowest number are those of NaN
        if tl.exp((x.to(tl.float64) - best) / temperature) >= min_p:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def _at(way, number, s):
    return tl.where(way == number, tl.sum(s, axis=0).to(tl.float64), 0.0)


@triton.jit
def _search(row, width, low, high, target, best, heat, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The highest key in [low, high] at and above which the tokens weigh `target`, or `low`; and what weighs more than it.

    A token weighs its probability, or 1 without BY_MASS. Nothing above `high` is counted.
    """
    above = target * 0
    way = 1 + tl.arange(0, WAYS).to(tl.int64)
    while low < high:
        step = (high - low) // WAYS + 1
        # One sum a thread and way: nothing is exchanged between threads before the row is over.
        s1 = tl.zeros((BLOCK,), tl.float64 if BY_MASS else tl.int32)
        s2, s3, s4, s5, s6, s7, s8 = s1, s1, s1, s1, s1, s1, s1
        for start in range(0, index(width), BLOCK):
            x = _load(row, start + tl.arange(0, BLOCK), width)
            key = key_of(x)
            is_candidate = (key > low) & (key <= high)
            one = tl.where(is_candidate, _weight(x, best, heat), 0.0) if BY_MASS else is_candidate.to(tl.int32)
            s1 += tl.where(key >= low + step, one, 0)
            s2 += tl.where(key >= low + 2 * step, one, 0)
            s3 += tl.where(key >= low + 3 * step, one, 0)
            s4 += tl.where(key >= low + 4 * step, one, 0)
            s5 += tl.where(key >= low + 5 * step, one, 0)
            s6 += tl.where(key >= low + 6 * step, one, 0)
            s7 += tl.where(key >= low + 7 * step, one, 0)
            s8 += tl.where(key >= low + 8 * step, one, 0)
        sums = _at(way, 1, s1) + _at(way, 2, s2) + _at(way, 3, s3) + _at(way, 4, s4) + above
        sums += _at(way, 5, s5) + _at(way, 6, s6) + _at(way, 7, s7) + _at(way, 8, s8)
        reached = tl.sum(((sums >= target) & (low + way * step <= high)).to(tl.int64), axis=0)
        above = tl.sum(tl.where(way == reached + 1, sums, 0.0), axis=0)
        high = tl.minimum(high, low + (reached + 1) * step - 1)
        low = low + reached * step
    return low, above


@triton.jit
def _weigh_kept(row, start, width, threshold, best, heat, BLOCK: tl.constexpr):
    """Of a block: the weights above the threshold, and which logits equal it."""
    col = start + tl.arange(0, BLOCK)
    x = _load(row, col, width)
    key = key_of(x)
    w = tl.where((key > threshold) & (x > -float("inf")), _weight(x, best, heat), 0.0)
    return w, ((key == threshold) & (col < width)).to(tl.int32)


@triton.jit
def _weight_of_key(key, best, heat):
    """What a logit with this key weighs; LOWEST is no number's key."""
    x = tl.where(key > LOWEST, _float_of(key), -float("inf"))
    return tl.where(x > -float("inf"), _weight(x, best, heat), 0.0)


@triton.jit
def _total(row, width, threshold, ties, best, heat, BLOCK: tl.constexpr):
    """The weight of all that is kept."""
    total = tl.zeros((BLOCK,), tl.float64)
    num_ties = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, index(width), BLOCK):
        w, is_tie = _weigh_kept(row, start, width, threshold, best, heat, BLOCK)
        total += w
        num_ties += is_tie
    kept = tl.minimum(tl.sum(num_ties, axis=0).to(tl.int64), ties)
    return tl.sum(total, axis=0) + kept.to(tl.float64) * _weight_of_key(threshold, best, heat)


@triton.jit
def _draw(row, width, threshold, ties, u, best, heat, BLOCK: tl.constexpr):
    """The first kept id whose cumulative weight exceeds u times all of it."""
    target = u * _total(row, width, threshold, ties, best, heat, BLOCK)
    one = _weight_of_key(threshold, best, heat)
    # The block in which the sum gets there, or the last in which anything is kept; what comes before it.
    start = tl.full((), 0, tl.int32)
    at = start
    mass = u * 0
    before = mass
    left = ties
    left_before = ties
    while (start < width) & (mass <= target):
        w, is_tie = _weigh_kept(row, start, width, threshold, best, heat, BLOCK)
        kept = tl.minimum(tl.sum(is_tie, axis=0).to(tl.int64), left)
        added = tl.sum(w, axis=0) + kept.to(tl.float64) * one
        at = tl.where(added > 0, start, at)
        before = tl.where(added > 0, mass, before)
        left_before = tl.where(added > 0, left, left_before)
        mass += added
        left -= kept
        start += BLOCK
    col = at + tl.arange(0, BLOCK)
    w, is_tie = _weigh_kept(row, at, width, threshold, best, heat, BLOCK)
    w += tl.where((is_tie > 0) & (tl.cumsum(is_tie, axis=0) <= left_before), one, 0.0)
    found = tl.min(tl.where((w > 0) & (before + tl.cumsum(w, axis=0) > target), col, NOWHERE), axis=0)
    return tl.where(found == NOWHERE, tl.max(tl.where(w > 0, col, 0), axis=0), found)


@triton.jit
def _sample_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, out, stride, width, BLOCK: tl.constexpr, SEARCHED: tl.constexpr
):  # fmt: skip
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
    best_x, best_id, is_bad = _best_of(row, width, BLOCK)
    temperature = tl.load(temperatures + number).to(tl.float64)
    if (is_bad > 0) | (best_x == -float("inf")):
        tl.store(out + number, -1)
    elif temperature <= 0:
        tl.store(out + number, best_id)
    else:
        best = best_x.to(tl.float64)
        heat = 1.4426950408889634 / temperature
        best_key = key_of(best_x)
        threshold = best_key * 0 + LOWEST
        ties = best_key * 0 + NOWHERE
        min_p = tl.load(min_ps + number).to(tl.float64)
        if min_p > 0:
            threshold = _lowest_key(best, temperature, min_p, best_key)
        top_k = tl.load(top_ks + number).to(tl.int64)
        if (top_k > 0) & (top_k < width):
            threshold, above = _search(row, width, threshold, best_key, top_k.to(tl.float64), best, heat, False, SEARCHED)
            ties = top_k - above.to(tl.int64)
        top_p = tl.load(top_ps + number).to(tl.float64)
        if top_p < 1:
            target = top_p * _total(row, width, threshold, ties, best, heat, BLOCK)
            lowest = threshold
            threshold, above = _search(row, width, lowest, best_key, target, best, heat, True, SEARCHED)
            one = _weight(tl.maximum(_float_of(threshold), -3.4028234663852886e38), best, heat)
            # As many ties as reach the share; where tokens weigh nothing any number does.
            wanted = tl.maximum(tl.ceil(tl.minimum((target - above) / tl.maximum(one, 1e-300), 2.0e9)), 1.0).to(tl.int64)
            ties = tl.where(threshold > lowest, wanted, tl.minimum(wanted, ties))
        u = _uniform(tl.load(seeds + number).to(tl.uint64, bitcast=True), tl.load(positions + number).to(tl.uint64, bitcast=True))
        tl.store(out + number, _draw(row, width, threshold, ties, u, best, heat, BLOCK))


@triton.jit
def _logsumexp_kernel(logits, out, stride, width, BLOCK: tl.constexpr):
    row = logits + tl.program_id(0).to(tl.int64) * stride
    top, _, _ = _best_of(row, width, BLOCK)
    shift = tl.where((top == -float("inf")) | (top == float("inf")), 0.0, top).to(tl.float64)
    total = shift * 0
    for start in range(0, index(width), BLOCK):
        total += tl.sum(tl.exp(_load(row, start + tl.arange(0, BLOCK), width).to(tl.float64) - shift), axis=0)
    value = tl.where(total == 0, -float("inf"), tl.log(tl.where(total == 0, 1.0, total)) + shift)
    tl.store(out + tl.program_id(0), value.to(tl.float32))


@triton.jit
def _is_finite_kernel(logits, out, stride, width, BLOCK: tl.constexpr):
    row = logits + tl.program_id(0).to(tl.int64) * stride
    top, _, is_bad = _best_of(row, width, BLOCK)
    tl.store(out + tl.program_id(0), ((is_bad == 0) & (top > -float("inf"))).to(tl.int8))


@implements("sample", device="cuda")
def sample(
    logits_RV: Array,
    temperature_R: Array,
    top_k_R: Array,
    top_p_R: Array,
    min_p_R: Array,
    seed_R: Array,
    position_R: Array,
) -> Array:
    """`seed_R` may be uint64, or int64 with the same bits."""
    check_rows("sample", logits=logits_RV, temperature=temperature_R, top_k=top_k_R, top_p=top_p_R, min_p=min_p_R,
               seed=seed_R, position=position_R)  # fmt: skip
    rows, width = logits_RV.shape
    out = torch.empty(rows, dtype=torch.int32, device=logits_RV.device)
    launch(
        _sample_kernel, (rows,), logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, seed_R.view(torch.int64), position_R, out,
        logits_RV.stride(0), width, BLOCK=_SEARCHED if arch_of(logits_RV).backend == "hip" else _BLOCK, SEARCHED=_SEARCHED, num_warps=_WARPS,
    )  # fmt: skip
    return out


@implements("row_logsumexp", device="cuda")
def row_logsumexp(logits_RV: Array) -> Array:
    rows, width = logits_RV.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    launch(_logsumexp_kernel, (rows,), logits_RV, out, logits_RV.stride(0), width, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


@implements("row_is_finite", device="cuda")
def row_is_finite(logits_RV: Array) -> Array:
    rows, width = logits_RV.shape
    out = torch.empty(rows, dtype=torch.int8, device=logits_RV.device)
    launch(_is_finite_kernel, (rows,), logits_RV, out, logits_RV.stride(0), width, BLOCK=_BLOCK, num_warps=_WARPS)
    return out.view(torch.bool)
