"""Steps that are joined when recorded: the same bits as one by one, and no joining where it would change a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pagoda.kernels import ops
from pagoda.kernels.cpu import library
from pagoda.kernels.record import Program, Recorder
from pagoda.kernels.weight import FORMATS

from .cases import normal, weight

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
