"""Steps that become one: the norm in front of a product, the gated activation behind it, and what comes before attention.

    rms_norm  x -> h     linear       h -> y     =>    linear  x -> y, which normalises the rows where it rounds them
    linear    x -> gu    act_and_mul gu -> y     =>    linear  x -> y, which multiplies the two halves where it stores them
    rope q|k, kv_write k v, attention q -> y             =>    attention  q, k, v -> y, which turns queries as it reads them and keys
                                                               as it writes them

Products between two attentions also learn which pages the second one will read, and ask for them meanwhile (csrc/kernels/pages.h).

With few rows every thread normalises all of them itself, which is cheaper than meeting; with many, rows go through memory once
less. A sequence that decodes has its keys written by the task that attends, so that nobody waits. The arithmetic is that of
the ops, so the results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pagoda.kernels.symbolic import Step, SymArray, access

__all__ = ["fuse"]

_GATED_UNIT = 128  # rows of a weight whose halves any instruction set's tiles divide


def fuse(steps: Sequence[Step], outputs: Sequence[SymArray]) -> list[Step]:
    """The steps, with every pair that may be joined joined. `outputs` are read after the last one."""
    ends = {id(output.slot) for output in outputs}
    found = _join(_join(steps, ends, "rms_norm", "linear", _with_norm), ends, "linear", "act_and_mul", _with_activation)
    return _ask_for_pages(_join_attention(found, ends))


def _join(steps: Sequence[Step], ends: set[int], first: str, then: str, joined: Callable[[Step, Step], Step | None]) -> list[Step]:
    """Puts `joined` in the place of each `then` that alone reads what a `first` alone wrote."""
    readers: dict[int, list[int]] = {}
    writers: dict[int, list[int]] = {}
    for k, step in enumerate(steps):
        for i, x in enumerate(step.operands):
            if isinstance(x, SymArray):
                (writers if i in step.written else readers).setdefault(id(x.slot), []).append(k)
    kept: list[Step | None] = list(steps)
    for k, step in enumerate(steps):
        between = step.operands[step.written[0]] if step.op == first else None
        if not isinstance(between, SymArray) or between.slot.outside is not None or id(between.slot) in ends:
            continue
        uses = readers.get(id(between.slot), [])
        if len(uses) != 1 or writers[id(between.slot)] != [k] or steps[uses[0]].op != then or access(steps[uses[0]].operands[0]) != access(between):
            continue
        source = access(step.operands[0])  # read later than before: nothing may write there in the meantime
        is_changed = any(source.overlaps(w) for later in steps[k + 1 : uses[0] + 1] for w in later.accesses()[1])
        made = None if is_changed else joined(step, steps[uses[0]])
        if made is not None:
            kept[uses[0]], kept[k] = made, None
    return [step for step in kept if step is not None]


def _with_norm(norm: Step, product: Step) -> Step | None:
    x, weight, _ = norm.operands
    if weight.shape[0] != x.shape[1]:
        return None  # a norm of each head, not of the row
    _, *rest = product.operands[:-1]
    return Step("linear", (x, *rest, weight), (1, 0), norm.floats)


def _with_activation(product: Step, activation: Step) -> Step | None:
    x, weight, bias, residual, out, norm = product.operands
    if residual is not None or weight.shape[0] % _GATED_UNIT or activation.operands[0].shape != out.shape:
        return None
    prepared = product.ints[0] if product.ints else 0
    return Step("linear", (x, weight, bias, None, activation.operands[1], norm), (prepared, 1 + activation.ints[0]), product.floats)


def _join_attention(steps: Sequence[Step], ends: set[int]) -> list[Step]:
    """Puts one attention in the place of each run of rope, kv_write, attention that nobody else sees into."""
    last_read: dict[int, int] = {}
    for k, step in enumerate(steps):
        last_read |= {id(x.slot): k for i, x in enumerate(step.operands) if isinstance(x, SymArray) and i not in step.written}
    made: list[Step] = []
    k = 0
    while k < len(steps):
        run = steps[k : k + 3]
        joined = _with_rope(*run) if [step.op for step in run] == ["rope", "kv_write", "attention"] else None
        if joined is not None:
            turned = id(joined.operands[0].slot)
            joined = None if turned in ends or last_read[turned] > k + 2 else joined
        made.append(steps[k] if joined is None else joined)
        k += 1 if joined is None else 3
    return made


def _with_rope(turn: Step, write: Step, attention: Step) -> Step | None:
    x, positions, table, turned = turn.operands
    k, v, *planes, slots = write.operands
    q, *read, out = attention.operands
    if not all(isinstance(array, SymArray) and array.slot.outside is None for array in (x, turned, q, k, v, out)):
        return None
    at_x, at_q, at_k, at_v, at_out = (access(array) for array in (x, q, k, v, out))
    is_chain = access(turned) == at_x and at_q.memory == at_k.memory == at_x.memory
    is_chain = is_chain and (at_q.start, at_q.stop, at_k.stop) == (at_x.start, at_k.start, at_x.stop)  # it turns both, and nothing else
    is_same = tuple(write.ints) == tuple(attention.ints[:4]) and turn.ints[0] == attention.ints[2]
    is_same = is_same and all(a is b for a, b in zip(planes, read[:2], strict=True))
    spoilt = [(at_x, at_v), (at_out, at_x), (at_out, at_v)]
    if not is_chain or not is_same or any(a.overlaps(b) for a, b in spoilt):
        return None
    return Step("attention", (*attention.operands, k, v, slots, positions, table), attention.ints, attention.floats)


def _ask_for_pages(steps: Sequence[Step]) -> list[Step]:
    """Gives each attention's planes, block table and lengths to the products since the one before, and each its share by the size of its weight."""
    made = list(steps)
    products: list[int] = []
    for k, step in enumerate(steps):
        if step.op == "linear":
            products.append(k)
        elif step.op == "attention":
            sizes = [steps[p].operands[1].shape[0] * steps[p].operands[1].shape[1] for p in products]
            ends = [65536 * sum(sizes[: n + 1]) // sum(sizes) for n in range(len(sizes))]
            _, keys, values, table, _, lens, *_ = step.operands
            for p, begin, end in zip(products, [0, *ends], ends, strict=False):
                product = steps[p]
                kinds = tuple(product.ints) or (0, 0)
                made[p] = Step("linear", (*product.operands, keys, values, table, lens), (*kinds, *step.ints[:5], begin, end), product.floats)
            products = []
    return made
