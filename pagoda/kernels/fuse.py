"""Steps that become one: the norm in front of a product, and the gated activation behind it.

    rms_norm  x -> h     linear       h -> y     =>    linear  x -> y, which normalises the rows where it rounds them
    linear    x -> gu    act_and_mul gu -> y     =>    linear  x -> y, which multiplies the two halves where it stores them

With few rows every thread normalises all of them itself, which is cheaper than meeting; with many, rows go through memory once
less. The arithmetic is that of the two ops, so the results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pagoda.kernels.symbolic import Step, SymArray, access

__all__ = ["fuse"]

_GATED_UNIT = 128  # rows of a weight whose halves any instruction set's tiles divide


def fuse(steps: Sequence[Step], outputs: Sequence[SymArray]) -> list[Step]:
    """The steps, with every pair that may be joined joined. `outputs` are read after the last one."""
    ends = {id(output.slot) for output in outputs}
    return _join(_join(steps, ends, "rms_norm", "linear", _with_norm), ends, "linear", "act_and_mul", _with_activation)


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
