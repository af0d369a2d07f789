"""Recording: a small forward replayed natively equals the same forward op by op, bit for bit."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pagoda.kernels import ops, table
from pagoda.kernels.cpu import library
from pagoda.kernels.kv import KvPlane, allocate_kv_plane
from pagoda.kernels.record import Program, Recorder
from pagoda.kernels.table import CannotRecord
from pagoda.kernels.weight import Weight, pack

from .cases import FORMATS, normal, rope_table, weight

HEADS, KV_HEADS, DIM, WIDTH, FF, VOCAB, LAYERS = 6, 2, 16, 96, 160, 77, 3
MAX_ROWS = {"T": 40, "S": 6, "R": 8}


@dataclass
class Layer:
    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    bias: np.ndarray
    norm: np.ndarray
    qk_norm: np.ndarray
    cache: KvPlane


@dataclass
class Tiny:
    """A forward with everything families differ by: biases, qk-norm, windows, soft caps, odd widths."""

    rng: np.random.Generator
    formats: tuple[str, ...]
    cache_dtype: str = "bfloat16"
    layers: list[Layer] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng, qkv = self.rng, (HEADS + 2 * KV_HEADS) * DIM
        self.table = weight(rng, self.formats[0], VOCAB, WIDTH)
        self.rope = rope_table(200, DIM)
        for k in range(LAYERS):
            f = self.formats[k % len(self.formats)]
            cache = allocate_kv_plane(dtype=self.cache_dtype, block_size=16, num_blocks=24, num_kv_heads=KV_HEADS, head_dim=DIM)
            matrices = [weight(rng, f, n, d) for n, d in ((qkv, WIDTH), (WIDTH, HEADS * DIM), (2 * FF, WIDTH), (WIDTH, FF))]
            self.layers.append(Layer(*matrices, normal(rng, qkv), normal(rng, WIDTH), normal(rng, DIM), cache))

    def forward(self, b: dict[str, Any], recorder: Recorder | None = None) -> tuple[Any, Any]:
        x = ops.embedding(b["ids"], self.table, scale=2.0)
        for k, layer in enumerate(self.layers):
            h = ops.rms_norm(x, layer.norm, eps=1e-6)
            qkv = ops.linear(h, layer.qkv, layer.bias)
            q, kk, v = (qkv[:, a:z] for a, z in ((0, 96), (96, 128), (128, 160)))
            ops.rms_norm(q, layer.qk_norm, eps=1e-6, out=q)
            ops.rope(qkv[:, :128], b["positions"], self.rope, head_dim=DIM, out=qkv[:, :128])
            ops.kv_write(kk, v, layer.cache, b["slots"])
            a = ops.attention(
                q, layer.cache, b["table"], b["starts"], b["lens"], scale=0.25, head_dim=DIM, window=7 * (k % 2), soft_cap=20.0 * (k == 2)
            )
            x = ops.linear(a, layer.o, residual=x, out=x)
            h = ops.rms_norm(x, layer.norm, eps=1e-6)
            gate_up = ops.empty_like_rows(h, 2 * FF)
            ops.linear(h, layer.gate_up, out=gate_up)
            h = ops.act_and_mul(gate_up, "gelu_tanh", out=gate_up[:, :FF])
            x = ops.add(x, ops.scale(ops.linear(h, layer.down), 0.5))
            if recorder is not None:
                recorder.mark()
        logits = ops.soft_cap(ops.linear(ops.gather_rows(x, b["rows"]), self.table), 30.0)
        return logits, ops.row_logsumexp(logits)


def batch(rng: np.random.Generator, lens: list[int], queries: list[int]) -> dict[str, np.ndarray]:
    """Persistent arrays of the full size, filled for this step."""
    t, s = sum(queries), len(lens)
    b: dict[str, np.ndarray] = {
        "ids": np.zeros(MAX_ROWS["T"], np.int32),
        "positions": np.zeros(MAX_ROWS["T"], np.int64),
        "slots": np.full(MAX_ROWS["T"], -1, np.int64),
        "table": np.zeros((MAX_ROWS["S"], 4), np.int32),
        "starts": np.zeros(MAX_ROWS["S"] + 1, np.int32),
        "lens": np.zeros(MAX_ROWS["S"], np.int32),
        "rows": np.zeros(MAX_ROWS["R"], np.int32),
    }
    b["table"][:] = np.arange(MAX_ROWS["S"] * 4).reshape(-1, 4)
    b["ids"][:t] = rng.integers(0, VOCAB, t)
    b["starts"][: s + 1] = np.cumsum([0, *queries])
    b["lens"][:s] = lens
    for k, (n, q) in enumerate(zip(lens, queries)):
        at = np.arange(n - q, n)
        span = slice(int(b["starts"][k]), int(b["starts"][k + 1]))
        b["positions"][span] = at
        b["slots"][span] = b["table"][k, at // 16] * 16 + at % 16
    b["rows"][:s] = b["starts"][1 : s + 1] - 1
    return b


ROWS_OF = {"ids": "T", "positions": "T", "slots": "T", "table": "S", "lens": "S", "rows": "R"}


def record(model: Tiny, b: dict[str, np.ndarray]) -> Program:
    recorder = Recorder(max_rows=MAX_ROWS)
    inputs = {name: recorder.input(b[name], rows=rows) for name, rows in ROWS_OF.items()} | {"starts": b["starts"]}
    return recorder.finish(outputs=model.forward(inputs, recorder))


def trimmed(b: dict[str, np.ndarray], t: int, s: int) -> dict[str, np.ndarray]:
    n = {"T": t, "S": s, "R": s}
    return {name: b[name][: n[rows]] for name, rows in ROWS_OF.items()} | {"starts": b["starts"][: s + 1]}


STEPS = [([5, 17, 3], [5, 17, 3]), ([6, 18, 4, 9], [1, 1, 1, 9]), ([7], [1]), ([19, 5, 10, 1, 2, 3], [1, 1, 1, 1, 2, 3])]


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16"])
def test_recorded_equals_op_by_op(isa: str, cache_dtype: str) -> None:
    formats = ("q4_1", "bf16", "q8_0", "f32", "q4_0")
    now, later, truth = (Tiny(np.random.default_rng(0), formats, cache_dtype) for _ in range(3))
    buffers = batch(np.random.default_rng(1), [1], [1])
    program = record(later, buffers)
    rng = np.random.default_rng(2)
    for lens, queries in STEPS:
        step = batch(rng, lens, queries)
        for name, array in step.items():
            buffers[name][...] = array
        t, s = sum(queries), len(lens)
        logits, total = now.forward(trimmed(step, t, s))
        program.run(T=t, S=s, R=s)
        np.testing.assert_array_equal(program.output(0), logits)
        np.testing.assert_array_equal(program.output(1), total)
        assert program.progress == LAYERS
        with table.backend("reference"):
            reference, _ = truth.forward(trimmed(step, t, s))
        assert np.abs(reference - logits).max() < 0.25 * np.abs(reference).max()


def test_one_native_call_a_run_and_a_reused_arena() -> None:
    model = Tiny(np.random.default_rng(0), ("q8_0",))
    buffers = batch(np.random.default_rng(1), [5, 7], [5, 2])
    program = record(model, buffers)
    lib = library.default()
    before = lib.num_calls
    program.run(T=7, S=2, R=2)
    assert lib.num_calls == before + 1
    assert program.num_instructions == 5 + LAYERS * 10  # norms are part of products, rope and kv_write of attention
    per_layer_bytes = MAX_ROWS["T"] * 4 * (WIDTH * 5 + 160 + 2 * FF)
    assert program.arena_nbytes < 2 * per_layer_bytes
    assert program.num_barriers < program.num_instructions - LAYERS  # what does not depend does not wait


def test_marks_can_be_waited_for_from_another_thread() -> None:
    model = Tiny(np.random.default_rng(0), ("f32",))
    program = record(model, batch(np.random.default_rng(1), [5], [5]))
    seen = []
    waiter = threading.Thread(target=lambda: seen.append(program.wait_mark(2, 10.0)))
    waiter.start()
    program.run(T=5, S=1, R=1)
    waiter.join()
    assert seen == [True]
    assert not program.wait_mark(LAYERS + 1, 0.001)


def test_threads_and_instruction_set_may_change_under_a_program() -> None:
    lib = library.default()
    model = Tiny(np.random.default_rng(0), ("q4_1", "bf16"))
    program = record(model, batch(np.random.default_rng(1), [33], [33]))
    threads, results = lib.num_threads, []
    try:
        for n in (1, 3, 2):
            lib.set_threads(n)
            program.run(T=33, S=1, R=1)
            results.append(program.output(0).copy())
    finally:
        lib.set_threads(threads)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_too_many_rows_is_an_error_and_no_rows_is_fine() -> None:
    program = record(Tiny(np.random.default_rng(0), ("f32",)), batch(np.random.default_rng(1), [5], [5]))
    with pytest.raises(library.KernelFault, match="rows 41 of symbol T"):
        program.run(T=41, S=1, R=1)
    program.run(T=0, S=0, R=0)
    assert program.output(0).shape == (0, VOCAB)


def test_bad_operands_are_refused_when_recorded() -> None:
    recorder = Recorder(max_rows={"T": 4, "R": 2})
    x = recorder.input(np.zeros((4, 8), np.float32), rows="T")
    idx = recorder.input(np.zeros(2, np.int32), rows="R")
    with pytest.raises(ValueError, match="length must divide the width"):
        ops.rms_norm(x, np.ones(3, np.float32), eps=1e-5)
    with pytest.raises(ValueError, match="different numbers of rows"):
        ops.add(x, ops.gather_rows(x, idx))
    with pytest.raises(CannotRecord):
        x[1]
    with pytest.raises(CannotRecord):
        np.exp(np.asarray(x))


@pytest.mark.parametrize("format", FORMATS)
def test_products_of_no_rows(isa: str, format: str) -> None:
    """A step that samples nothing has a language head without rows."""
    w = weight(np.random.default_rng(0), format, 64, 256)
    recorder = Recorder(max_rows={"R": 64})
    program = recorder.finish(outputs=[ops.linear(recorder.input(np.ones((64, 256), np.float32), rows="R"), w)])
    for rows in (0, 64, 1, 0):
        program.run(R=rows)
        assert program.output(0).shape == (rows, 64)


def test_an_op_without_recording_is_a_typed_error() -> None:
    recorder = Recorder(max_rows={"T": 4})
    with pytest.raises(CannotRecord, match="`moon_phase`"):
        table.lookup("moon_phase", recorder.input(np.zeros((4, 8), np.float32), rows="T"))


def test_impossible_contents_are_a_fault_not_a_crash() -> None:
    w = weight(np.random.default_rng(0), "f32", 10, 8)
    with pytest.raises(library.KernelFault, match="id is outside"):
        ops.embedding(np.array([3, 10]), w)
    with pytest.raises(library.KernelFault, match="index is outside"):
        ops.gather_rows(np.zeros((2, 4), np.float32), np.array([-1]))
    cache = allocate_kv_plane(dtype="float32", block_size=16, num_blocks=2, num_kv_heads=1, head_dim=8)
    row = np.zeros((1, 8), np.float32)
    with pytest.raises(library.KernelFault, match="slot is outside"):
        ops.kv_write(row, row, cache, np.array([32]))
    starts, lens = np.array([0, 1], np.int32), np.array([20], np.int32)
    with pytest.raises(library.KernelFault, match="block table entry"):
        ops.attention(row, cache, np.array([[0, 2]], np.int32), starts, lens, scale=1.0, head_dim=8)


def test_a_program_notices_that_a_context_has_grown_long() -> None:
    """How an attention is cut into phases depends on lengths, which change while the numbers of rows do not."""
    rng, pages = np.random.default_rng(0), 130
    cache = allocate_kv_plane(dtype="bfloat16", block_size=16, num_blocks=pages, num_kv_heads=KV_HEADS, head_dim=DIM)
    kv = normal(rng, 16 * pages, KV_HEADS * DIM)
    ops.kv_write(kv, kv[::-1].copy(), cache, np.arange(16 * pages))
    q, table, lens = normal(rng, 1, HEADS * DIM), np.arange(pages, dtype=np.int32)[None], np.array([1], np.int32)
    starts = np.array([0, 1], np.int32)
    recorder = Recorder(max_rows={"T": 1, "S": 1})
    given = [recorder.input(array, rows=rows) for array, rows in ((q, "T"), (table, "S"), (lens, "S"))]
    program = recorder.finish(outputs=[ops.attention(given[0], cache, given[1], starts, given[2], scale=0.25, head_dim=DIM)])
    for length in (7, 1024, 1025, 2050, 100):
        lens[0] = length
        program.run(T=1, S=1)
        np.testing.assert_array_equal(program.output(0), ops.attention(q, cache, table, starts, lens, scale=0.25, head_dim=DIM))


def chain(vocab: int = 50) -> tuple[Program, np.ndarray, np.ndarray]:
    """A program that draws for each row the id behind the one it is given, and its staged inputs: ids and whose draw they are."""
    following = np.eye(vocab, dtype=np.float32)[:, (np.arange(vocab) - 1) % vocab] * 9  # row i is largest at i + 1
    ids, source = np.zeros(4, np.int32), np.full(4, -1, np.int32)
    columns = [np.zeros(4, kind) for kind in (np.float32, np.int32, np.float32, np.float32, np.uint64, np.int64)]
    recorder = Recorder(max_rows={"T": 4, "R": 4})
    tokens, sources = recorder.feed(ids, "T"), recorder.feed(source, "T")
    logits = ops.embedding(tokens, pack("f32", [following]))
    drawn = ops.sample(ops.gather_rows(logits, recorder.feed(np.arange(4, dtype=np.int32), "R")), *(recorder.feed(c, "R") for c in columns))
    recorder.follow(tokens, sources, drawn)
    return recorder.finish(outputs=[logits, drawn]), ids, source


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_run_is_asked_for_while_the_one_before_it_is_under_way(threads: int) -> None:
    """Its inputs are copied at once, and tokens not known yet are those that the run before draws."""
    lib = library.default()
    before = lib.num_threads
    lib.set_threads(threads)
    try:
        program, ids, source = chain()
        ids[:3] = 3, 17, 49
        program.start(T=3, R=3)
        ids[:], source[:3] = 30, (2, -1, 0)  # of the second run: two rows that the first one draws, and 30
        found = []
        for _ in range(40):
            program.start(T=3, R=3)
            source[:3] = 0, 1, 2  # from now on each row goes on by itself
            found.append(program.join()[0].tolist())
        assert found[0] == [4, 18, 0]
        assert found[1:] == [[(1 + k) % 50, (31 + k) % 50, (5 + k) % 50] for k in range(39)]
        last, seconds = program.join()
        assert last.tolist() == [40, 20, 44] and 0 < seconds < program.seconds
        np.testing.assert_array_equal(program.output(1), last)
    finally:
        lib.set_threads(before)


def test_halves_of_runs_out_of_order_are_errors() -> None:
    program, _, _ = chain()
    program.start(T=1, R=1)
    program.start(T=1, R=1)
    with pytest.raises(library.KernelFault, match="two runs are under way"):
        program.start(T=1, R=1)
    with pytest.raises(library.KernelFault, match="a run is under way"):
        program.run(T=1, R=1)
    assert program.join()[0].tolist() == program.join()[0].tolist() == [1]
    with pytest.raises(library.KernelFault, match=r"outside 0\.\.4"):
        program.start(T=5, R=1)
    program.run(T=1, R=1)
    program.start(T=4, R=4)
    del program  # waits for what is under way


def test_a_fault_is_told_where_its_run_is_joined() -> None:
    """And the run behind it goes on, with token 0 where none could be drawn."""
    program, ids, source = chain()
    ids[0] = 77
    program.start(T=1, R=1)
    ids[0] = 5
    program.start(T=1, R=1)
    with pytest.raises(library.KernelFault, match="id is outside"):
        program.join()
    assert program.join()[0].tolist() == [6]
    weights = pack("f32", [np.full((8, 8), np.nan, np.float32)])
    ids, source = np.zeros(1, np.int32), np.full(1, -1, np.int32)
    recorder = Recorder(max_rows={"T": 1, "R": 1})
    tokens, sources = recorder.feed(ids, "T"), recorder.feed(source, "T")
    columns = [np.zeros(1, kind) for kind in (np.float32, np.int32, np.float32, np.float32, np.uint64, np.int64)]
    rows = ops.gather_rows(ops.embedding(tokens, weights), recorder.feed(np.zeros(1, np.int32), "R"))
    drawn = ops.sample(rows, *(recorder.feed(c, "R") for c in columns))
    recorder.follow(tokens, sources, drawn)
    program = recorder.finish(outputs=[drawn])
    program.start(T=1, R=1)
    source[0] = 0
    program.start(T=1, R=1)
    assert program.join()[0].tolist() == program.join()[0].tolist() == [-1]
