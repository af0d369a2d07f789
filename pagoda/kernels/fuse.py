"""Steps that become one: the norm or the gated activation in front of a product is done where the product rounds its rows.

    rms_norm  x -> h    linear  h -> y        =>    linear  x -> y, prepared by the norm
    act_and_mul gu -> h linear  h -> y        =>    linear gu -> y, prepared by the activation

With few rows every thread then prepares all of them itself, which is cheaper than meeting; with many, rows are shared out, but
go through memory once less. The arithmetic is that of the two ops, so the results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.kernels.symbolic import Access, Slot, Step, SymArray, access

__all__ = ["fuse"]

_AS_IS, _RMS_NORM, _ACT_AND_MUL = 0, 1, 2  # the first integer of the native op `linear`


def fuse(steps: Sequence[Step], outputs: Sequence[SymArray]) -> list[Step]:
    """The steps, with every pair that may be joined joined. `outputs` are read after the last one."""
    readers: dict[int, list[int]] = {}
    for k, step in enumerate(steps):
        for i, x in enumerate(step.operands):
            if isinstance(x, SymArray) and i not in step.written:
                readers.setdefault(id(x.slot), []).append(k)
    kept: list[Step | None] = list(steps)
    ends = {id(output.slot) for output in outputs}
    for k, step in enumerate(steps):
        made = step.operands[step.written[0]] if step.op in ("rms_norm", "act_and_mul") else None
        if not isinstance(made, SymArray) or made.slot.outside is not None or id(made.slot) in ends or made.slot is step.operands[0].slot:
            continue
        uses = readers.get(id(made.slot), [])
        if len(uses) == 1 and _may_join(steps, k, uses[0], made.slot):
            kept[uses[0]], kept[k] = _joined(step, steps[uses[0]]), None
    return [step for step in kept if step is not None]


def _may_join(steps: Sequence[Step], first: int, then: int, between: Slot) -> bool:
    """Whether step `first`, which alone writes `between`, may be done by the product `then`, which alone reads it."""
    source, product = steps[first].operands[0], steps[then]
    if product.op != "linear" or then < first or product.ints:
        return False
    if sum(x.slot is between for s in steps for k in s.written if isinstance(x := s.operands[k], SymArray)) != 1:
        return False
    if steps[first].op == "rms_norm" and steps[first].operands[1].shape[0] != source.shape[1]:
        return False  # a norm of each head, not of the row
    late: list[Access] = [w for step in steps[first + 1 : then + 1] for w in step.accesses()[1]]
    return not any(access(source).overlaps(w) for w in late)


def _joined(step: Step, product: Step) -> Step:
    x, *rest = step.operands[:-1]
    _, weight, bias, residual, out, _ = product.operands
    operands = (x, weight, bias, residual, out, rest[0] if rest else None)
    if step.op == "rms_norm":
        return Step("linear", operands, (_RMS_NORM,), step.floats)
    return Step("linear", operands, (_ACT_AND_MUL, *step.ints), ())
