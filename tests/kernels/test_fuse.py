"""Steps that are joined when recorded: the same bits as one by one, and no joining where it would change a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pagoda.kernels import ops
from pagoda.kernels.cpu import library
from pagoda.kernels.fuse import fuse
from pagoda.kernels.kv import DTYPES
from pagoda.kernels.record import Program, Recorder
from pagoda.kernels.weight import FORMATS

from .cases import filled_cache, normal, rope_table, weight

MAX, WIDTH = 40, 256
Array = Any


def record(x: np.ndarray, forward: Callable[[Array], Array]) -> Program:
    recorder = Recorder(max_rows={"T": MAX})
    return recorder.finish(outputs=[forward(recorder.input(x, rows="T"))])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 4, 9, 40])
def test_joined_steps_give_the_same_bits(isa: str, format: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, norm = normal(rng, MAX, WIDTH), normal(rng, WIDTH)
    up, down, bias = weight(rng, format, 2 * WIDTH, WIDTH), weight(rng, format, 48, WIDTH), normal(rng, 2 * WIDTH)
    lib = library.default()
    threads = lib.num_threads
    for kind in ("silu", "gelu_tanh", "gelu", "relu"):

        def forward(x_TD: Array, kind: str = kind) -> Array:
            gate_up = ops.linear(ops.rms_norm(x_TD, norm, eps=1e-5), up, bias)
            return ops.linear(ops.act_and_mul(gate_up, kind), down)

        program = record(x, forward)
        assert program.num_instructions == 2
        wanted = forward(x[:rows])
        try:
            for n in (1, 2):
                lib.set_threads(n)
                program.run(T=rows)
                np.testing.assert_array_equal(program.output(0), wanted)
        finally:
            lib.set_threads(threads)


def _read_twice(x: Array, norm: np.ndarray, w: Any) -> Array:
    h = ops.rms_norm(x, norm, eps=1e-5)
    return ops.add(h, ops.linear(h, w))


def _source_changes(x: Array, norm: np.ndarray, w: Any) -> Array:
    y = ops.scale(x, 1.0)
    h = ops.rms_norm(y, norm, eps=1e-5)
    ops.scale(y, 3.0, out=y)
    return ops.linear(h, w)


def _product_overwrites_source(x: Array, norm: np.ndarray, w: Any) -> Array:
    y = ops.scale(x, 1.0)
    return ops.linear(ops.rms_norm(y, norm, eps=1e-5), w, out=y)


def _norm_of_heads(x: Array, norm: np.ndarray, w: Any) -> Array:
    return ops.linear(ops.rms_norm(x, norm[:64].copy(), eps=1e-5), w)


def _part_of_it(x: Array, norm: np.ndarray, w: Any) -> Array:
    both = ops.empty_like_rows(x, 2 * WIDTH)
    ops.scale(x, 2.0, out=both[:, WIDTH:])
    ops.rms_norm(x, norm, eps=1e-5, out=both[:, :WIDTH])
    return ops.linear(both[:, WIDTH:], w)


def _read_as_residual(x: Array, norm: np.ndarray, w: Any) -> Array:
    return ops.linear(x, w, residual=ops.rms_norm(x, norm, eps=1e-5))


def _half_of_a_product(x: Array, norm: np.ndarray, w: Any) -> Array:
    y = ops.linear(x, w)
    return ops.act_and_mul(y[:, :128], "silu")


def _activation_with_residual(x: Array, norm: np.ndarray, w: Any) -> Array:
    return ops.act_and_mul(ops.linear(x, w, residual=x), "silu")


def _rows_that_tiles_do_not_halve(x: Array, norm: np.ndarray, w: Any) -> Array:
    return ops.act_and_mul(ops.linear(x, weight(np.random.default_rng(1), "q8_0", 96, WIDTH)), "silu")


@pytest.mark.parametrize(
    ("forward", "instructions"),
    [(_read_twice, 3), (_source_changes, 4), (_product_overwrites_source, 3), (_norm_of_heads, 2), (_part_of_it, 3), (_read_as_residual, 2), (_half_of_a_product, 2),
     (_activation_with_residual, 2), (_rows_that_tiles_do_not_halve, 2)],
)
@pytest.mark.parametrize("rows", [2, 40])
def test_what_must_not_be_joined_is_not(forward: Callable[..., Array], instructions: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    x, norm, w = normal(rng, MAX, WIDTH), normal(rng, WIDTH), weight(rng, "q8_0", WIDTH, WIDTH)
    program = record(x, lambda x_TD: forward(x_TD, norm, w))
    assert program.num_instructions == instructions
    program.run(T=rows)
    np.testing.assert_array_equal(program.output(0), forward(x[:rows], norm, w))


def test_a_result_that_is_asked_for_is_kept() -> None:
    rng = np.random.default_rng(0)
    x, norm, w = normal(rng, MAX, WIDTH), normal(rng, WIDTH), weight(rng, "bf16", 32, WIDTH)
    recorder = Recorder(max_rows={"T": MAX})
    h = ops.rms_norm(recorder.input(x, rows="T"), norm, eps=1e-5)
    program = recorder.finish(outputs=[ops.linear(h, w), h])
    program.run(T=5)
    np.testing.assert_array_equal(program.output(1), ops.rms_norm(x[:5], norm, eps=1e-5))


HEADS, GROUP = 2, 3
Forward = Callable[..., Array]


class _Tokens:
    """Sequences of given lengths of which the last tokens are new: what a forward is given, and a cache with what came before."""

    def __init__(self, dtype: str, lens: list[int], queries: list[int], dim: int = 64, rotary: int = 64) -> None:
        rng = np.random.default_rng(len(lens))
        self.dim, self.rows, self.sequences = dim, sum(queries), len(lens)
        self.qkv = normal(rng, self.rows, (GROUP + 2) * HEADS * dim)
        self.cache, self.table = filled_cache(rng, dtype, block_size=16, heads=HEADS, dim=dim, lens=lens)
        self.lens, self.starts = np.array(lens, np.int32), np.cumsum([0, *queries]).astype(np.int32)
        self.positions = np.concatenate([np.arange(n - m, n) for n, m in zip(lens, queries, strict=True)]).astype(np.int32)
        owner = np.repeat(np.arange(len(lens)), queries)
        self.slots = self.table[owner, self.positions // 16].astype(np.int64) * 16 + self.positions % 16
        self.angles = rope_table(max(lens), rotary)
        self.before = self.cache.k.copy(), self.cache.v.copy()

    def both(self, forward: Forward) -> tuple[Program, list[np.ndarray], list[np.ndarray]]:
        """-> the program; answer, keys and values of running it; the same of op by op."""
        recorder = Recorder(max_rows={"T": self.rows, "S": self.sequences})
        given = {name: recorder.input(getattr(self, name), rows="T") for name in ("qkv", "positions", "slots")}
        given |= {name: recorder.input(getattr(self, name), rows="S") for name in ("table", "lens")}
        program = recorder.finish(outputs=[forward(**given, tokens=self)])
        program.run(T=self.rows, S=self.sequences)
        found = [program.output(0).copy(), *self._cache()]
        self.cache.k[...], self.cache.v[...] = self.before
        given = {name: getattr(self, name) for name in given}
        wanted = [np.asarray(forward(**given, tokens=self)).copy(), *self._cache()]
        self.cache.k[...], self.cache.v[...] = self.before
        return program, found, wanted

    def _cache(self) -> list[np.ndarray]:
        return [x.view(np.uint8).copy() for x in (self.cache.k, self.cache.v)]


def _attend(*, qkv: Array, positions: Array, slots: Array, table: Array, lens: Array, tokens: _Tokens, v_from: int = 2, again: bool = False,
            turned: int = GROUP + 1, window: int = 0) -> Array:  # fmt: skip
    y, width = ops.scale(qkv, 1.0), HEADS * tokens.dim
    q, k, v = y[:, : GROUP * width], y[:, GROUP * width : (GROUP + 1) * width], y[:, (GROUP + v_from - 1) * width : (GROUP + v_from) * width]
    both = y[:, : turned * width]
    ops.rope(both, positions, tokens.angles, head_dim=tokens.dim, out=both)
    ops.kv_write(k, v, tokens.cache, slots)
    o = ops.attention(q, tokens.cache, table, tokens.starts, lens, scale=0.125, head_dim=tokens.dim, window=window)
    return ops.add(o, q) if again else o


@pytest.mark.parametrize(
    ("lens", "queries"),
    [([1], [1]), ([70, 17, 128, 33], [1, 1, 1, 1]), ([70, 32, 16], [2, 3, 1]), ([90, 40, 33], [1, 40, 9]), ([2100], [1]), ([1500, 20], [1, 1]),
     ([1 + 9 * i for i in range(20)], [1] * 20), ([63 + i for i in range(16)], [1 + i % 5 for i in range(16)])],
    ids=["first", "decode", "few", "mixed", "long", "long-and-short", "heads-together", "few-across-tiles"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_brings_its_own_keys(isa: str, dtype: str, lens: list[int], queries: list[int]) -> None:
    lib = library.default()
    threads = lib.num_threads
    try:
        for n, window in ((1, 0), (2, 0), (2, 20)):
            lib.set_threads(n)
            for dim, rotary in ((64, 64), (20, 12)):
                program, found, wanted = _Tokens(dtype, lens, queries, dim, rotary).both(lambda w=window, **given: _attend(**given, window=w))
                assert program.num_instructions == 2
                for a, b in zip(found, wanted, strict=True):
                    np.testing.assert_array_equal(a, b)
    finally:
        lib.set_threads(threads)


def test_decoding_meets_no_more_often_than_its_layers_do() -> None:
    """One stage where every sequence decodes, a second one where a prompt is among them."""
    for queries, stages in (([1, 1], 1), ([1, 60], 2)):
        program, _, _ = _Tokens("bfloat16", [70, 90], queries).both(_attend)
        program.trace(True)
        program.run(T=sum(queries), S=2)
        assert [name for name, _, _ in program.stage_times()] == ["scale", *["attention"] * stages]


def test_slots_elsewhere_are_written_where_they_say() -> None:
    """No task may take it for granted that a row is written where its sequence reads it."""
    tokens = _Tokens("bfloat16", [70, 33, 20], [1, 1, 1])
    tokens.slots[0], tokens.slots[1] = -1, tokens.slots[2] + 1
    _, found, wanted = tokens.both(_attend)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spoilt", [{"again": True}, {"v_from": 1}, {"turned": GROUP}, {"turned": GROUP + 2}], ids=["read-later", "keys-are-values", "keys-unturned", "turned-values"])
def test_attention_that_must_not_be_joined_is_not(spoilt: dict[str, Any]) -> None:
    program, found, wanted = _Tokens("float32", [70, 33], [1, 1]).both(lambda **given: _attend(**given, **spoilt))
    assert program.num_instructions == 4 + ("again" in spoilt)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_new_tokens_outside_what_there_is_are_faults() -> None:
    for name, value, message in (("slots", 10**6, "a slot is outside"), ("positions", 70, "a position is outside")):
        tokens = _Tokens("bfloat16", [70, 33], [1, 1])
        getattr(tokens, name)[1] = value
        with pytest.raises(library.KernelFault, match=message):
            tokens.both(_attend)


def _two_layers(tokens: _Tokens, recorder: Recorder | None, format: str, window: int) -> Array:
    """Product, attention, product, product, attention, product."""
    rng = np.random.default_rng(1)
    width, hidden = (GROUP + 2) * HEADS * tokens.dim, GROUP * HEADS * tokens.dim
    weights = [weight(rng, format, n, k) for n, k in ((width, hidden), (2 * hidden, hidden), (width, 2 * hidden), (48, hidden))]
    x, table, lens = normal(rng, tokens.rows, hidden), tokens.table, tokens.lens
    if recorder is not None:
        x, table, lens = recorder.input(x, rows="T"), recorder.input(table, rows="S"), recorder.input(lens, rows="S")

    def attend(qkv: Array) -> Array:
        return ops.attention(qkv[:, :hidden], tokens.cache, table, tokens.starts, lens, scale=0.125, head_dim=tokens.dim, window=window)

    y = attend(ops.linear(x, weights[0]))
    return ops.linear(attend(ops.linear(ops.linear(y, weights[1]), weights[2])), weights[3])


@pytest.mark.parametrize("format", ["f32", "bf16", "i8", "q4_1_a8", "q8_0"])
@pytest.mark.parametrize("window", [0, 40])
def test_products_ask_for_the_pages_of_the_attention_after_them(isa: str, format: str, window: int) -> None:
    """Each its share by size, those after the last attention nothing; and the same bits, with pages that do not exist among them."""
    tokens = _Tokens("int8", [1 + 17 * i for i in range(30)], [1] * 30)
    tokens.table[np.arange(tokens.table.shape[1])[None] * 16 >= tokens.lens[:, None]] = 10**6
    wanted = _two_layers(tokens, None, format, window)
    recorder = Recorder(max_rows={"T": tokens.rows, "S": tokens.sequences})
    answer = _two_layers(tokens, recorder, format, window)
    products = [step for step in fuse(recorder._steps, [answer]) if step.op == "linear"]
    shares = [tuple(step.ints[7:]) for step in products]
    middle = round(65536 * 2 * GROUP / (2 * GROUP + 2 * (GROUP + 2)))
    assert shares[0] == (0, 65536) and shares[1][0] == 0 and shares[2] == (shares[1][1], 65536) and shares[3] == ()
    assert abs(shares[1][1] - middle) <= 1 and all(step.operands[6] is tokens.cache.k for step in products[:3])
    program = recorder.finish(outputs=[answer])
    lib = library.default()
    threads = lib.num_threads
    try:
        for n in (1, 2):
            lib.set_threads(n)
            program.run(T=tokens.rows, S=tokens.sequences)
            np.testing.assert_array_equal(program.output(0), wanted)
    finally:
        lib.set_threads(threads)
