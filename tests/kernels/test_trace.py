"""A traced run says when each of its stages began, and names them."""

from __future__ import annotations

import numpy as np

from pagoda.kernels import ops
from pagoda.kernels.record import Program, Recorder
from pagoda.kernels.weight import pack


def record() -> tuple[Program, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 64)).astype(np.float32)
    recorder = Recorder(max_rows={"T": 8, "S": 1, "R": 1})
    sym = recorder.input(x, rows="T")
    weight = pack("bf16", [rng.standard_normal((32, 64)).astype(np.float32)])
    hidden = ops.linear(ops.scale(sym, 2.0), weight)
    return recorder.finish(outputs=[ops.add(hidden, hidden)]), x


def test_stages_are_named_in_order_and_follow_each_other() -> None:
    program, _ = record()
    program.run(T=8)
    assert program.stage_times() == [], "nothing is noted unless asked for"
    program.trace(True)
    program.run(T=8)
    stages = program.stage_times()
    names = [name for name, _, _ in stages]
    assert [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name] == ["scale", "linear", "add"]
    assert all(seconds >= 0 for _, _, seconds in stages)
    starts = [start for _, start, _ in stages]
    assert starts == sorted(starts)


def test_tracing_changes_no_bit() -> None:
    program, _ = record()
    program.run(T=8)
    plain = program.output(0).copy()
    program.trace(True)
    program.run(T=8)
    np.testing.assert_array_equal(program.output(0), plain)
