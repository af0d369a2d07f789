"""The sampler chain as one reads it in the papers: one row, Python lists, no tricks. What `worker/logits` must agree with."""

from __future__ import annotations

import math

Row = list[float]
OUT = -math.inf


def softmax(row: Row, temperature: float = 1.0) -> Row:
    top = max(row)
    p = [math.exp((x - top) / temperature) for x in row]
    return [x / math.fsum(p) for x in p]


def top_n_sigma(row: Row, n: float) -> Row:
    left = [x for x in row if x > OUT]
    mean = math.fsum(left) / len(left)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in left) / len(left))
    return [x if x >= max(left) - n * sigma else OUT for x in row]


def dynamic_temperature(row: Row, temperature: float, spread: float, exponent: float) -> float:
    """The temperature the row is drawn with."""
    p = softmax(row)
    entropy = -math.fsum(x * math.log(x) for x in p if x > 0)
    share = entropy / math.log(sum(x > OUT for x in row))
    low, high = max(0.0, temperature - spread), temperature + spread
    return max(0.01, low + (high - low) * share**exponent)


def typical(row: Row, temperature: float, mass: float) -> Row:
    p = softmax(row, temperature)
    entropy = -math.fsum(x * math.log(x) for x in p if x > 0)
    order = sorted((abs(-math.log(x) - entropy), i) for i, x in enumerate(p) if x > 0)
    kept: set[int] = set()
    for _, i in order:
        kept.add(i)
        if math.fsum(p[j] for j in kept) >= mass:
            break
    return [x if i in kept else OUT for i, x in enumerate(row)]


def truncated(row: Row, temperature: float, min_p: float, top_k: int, top_p: float) -> Row:
    p = softmax(row, temperature)
    order = sorted((i for i in range(len(row)) if p[i] > 0 and p[i] >= min_p * max(p)), key=lambda i: (-row[i], i))
    order = order[:top_k] if top_k > 0 else order
    total, kept, head = math.fsum(p[i] for i in order), set(), 0.0
    for i in order:
        kept.add(i)
        head += p[i]
        if top_p < 1 and head >= top_p * total:
            break
    return [x if i in kept else OUT for i, x in enumerate(row)]


def xtc(row: Row, temperature: float, threshold: float) -> Row:
    """When its random number says that it acts."""
    p = softmax(row, temperature)
    top = sorted((i for i in range(len(row)) if p[i] > 0 and p[i] >= threshold), key=lambda i: (-p[i], i))
    out = set(top[:-1])
    return [OUT if i in out else x for i, x in enumerate(row)]


def dry(row: Row, ids: list[int], multiplier: float, base: float, allowed: int, breakers: set[int]) -> Row:
    row = list(row)
    longest: dict[int, int] = {}
    for end in range(len(ids) - 1):  # a repetition that stood at [.., end], and went on with ids[end + 1]
        length = 0
        while length <= end and ids[end - length] == ids[len(ids) - 1 - length] and ids[end - length] not in breakers:
            length += 1
        longest[ids[end + 1]] = max(longest.get(ids[end + 1], 0), length)
    for token, length in longest.items():
        if length >= max(1, allowed):
            row[token] -= min(1e4, multiplier * base ** (length - allowed))
    return row


def mirostat(row: Row, temperature: float, mu: float) -> Row:
    p = softmax(row, temperature)
    return [x if q == max(p) or (q > 0 and -math.log2(q) <= mu) else OUT for x, q in zip(row, p, strict=True)]
