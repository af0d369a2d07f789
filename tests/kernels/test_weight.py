"""Packed weights and the block codecs they come from."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pagoda.kernels import gguf_blocks
from pagoda.kernels.weight import FORMATS, GgmlRows, pack, packed_nbytes, unpack

from .cases import bf16, normal

KINDS = [name for name in gguf_blocks.BLOCK_SIZES if name != "F32"]


def random_rows(rng: np.random.Generator, kind: str, n: int, k: int) -> np.ndarray:
    """Valid blocks of any type: random bytes, then finite scales where the format keeps half floats."""
    values, num_bytes = gguf_blocks.BLOCK_SIZES[kind]
    blocks = rng.integers(0, 256, (n * k // values, num_bytes), np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    if kind == "F16":
        blocks = normal(rng, n * k, 1).astype(np.float16).view(np.uint8)
    elif kind == "BF16":
        blocks = normal(rng, n * k, 1).astype(ml_dtypes.bfloat16).view(np.uint8)
    else:
        for at in halves.get(kind, (0,)):
            blocks[:, at : at + 2] = normal(rng, len(blocks), 1).astype(np.float16).view(np.uint8)
    return blocks.reshape(n, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_agrees_with_the_gguf_package(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    rows = random_rows(np.random.default_rng(1), kind, 6, 512)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(gguf_blocks.dequantize(kind, rows), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantize_errs_by_half_a_step(kind: str) -> None:
    w = normal(np.random.default_rng(2), 8, 96)
    back = gguf_blocks.dequantize(kind, gguf_blocks.quantize(kind, w))
    blocks = w.reshape(-1, 32)
    span = {"Q4_0": np.abs(blocks).max(1) / 8, "Q4_1": np.ptp(blocks, axis=1) / 15, "Q8_0": np.abs(blocks).max(1) / 127}[kind]
    error = np.abs(back.reshape(-1, 32) - blocks).max(1)
    assert (error <= span * (1.01 if kind == "Q4_0" else 0.51) + 2e-3).all()  # Q4_0 clips at +7 steps


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_kept_as_they_are(kind: str) -> None:
    rng = np.random.default_rng(3)
    parts = [random_rows(rng, kind, n, 64) for n in (20, 7, 33)]  # panels run across parts
    packed = pack(kind.lower(), [GgmlRows(kind, rows) for rows in parts])
    expected = np.concatenate([gguf_blocks.dequantize(kind, rows) for rows in parts])
    assert packed.shape == (60, 64)
    np.testing.assert_array_equal(unpack(packed), expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_in_any_format(format: str, source: type) -> None:
    w = normal(np.random.default_rng(4), 1040, 64).astype(source)  # more rows than are converted at a time
    packed = pack(format, [w[:1030], w[1030:]])
    exact = w.astype(np.float32)
    expected = {"f32": exact, "bf16": bf16(exact)}.get(format)
    if expected is None:
        expected = gguf_blocks.dequantize(format.upper(), gguf_blocks.quantize(format.upper(), exact))
    np.testing.assert_array_equal(unpack(packed), expected)
    assert packed.nbytes == packed_nbytes(format, 1040, 64)
    assert packed.data.ctypes.data % 64 == 0


def test_other_block_types_become_floats() -> None:
    rows = random_rows(np.random.default_rng(5), "Q6_K", 16, 256)
    packed = pack("bf16", [GgmlRows("Q6_K", rows)])
    np.testing.assert_array_equal(unpack(packed), bf16(gguf_blocks.dequantize("Q6_K", rows)))


def test_bits_a_weight() -> None:
    assert packed_nbytes("q4_1", 512, 256) == 512 * 256 * 5 // 8
    assert packed_nbytes("q8_0", 512, 256) == 512 * 256 * 17 // 16
    assert packed_nbytes("q4_0", 512, 256) == 512 * 256 * 9 // 16


def test_what_cannot_be_packed_is_refused() -> None:
    w = np.zeros((16, 40), np.float32)
    with pytest.raises(ValueError, match="not one of f32, bf16"):
        pack("q3_k", [w])
    with pytest.raises(ValueError, match="multiple of 32"):
        pack("q8_0", [w])
    with pytest.raises(ValueError, match="different widths"):
        pack("f32", [w, np.zeros((16, 8), np.float32)])
    with pytest.raises(ValueError, match="whole number"):
        gguf_blocks.dequantize("Q8_0", np.zeros((2, 35), np.uint8))
    with pytest.raises(ValueError, match="no decoder"):
        gguf_blocks.dequantize("IQ1_S", np.zeros((2, 50), np.uint8))
