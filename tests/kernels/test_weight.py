"""Packed weights and the block codecs they come from."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pagoda.kernels import gguf_blocks, ops, rotation
from pagoda.kernels.weight import FORMATS, GgmlRows, Weight, pack, packed_nbytes, storage_of, unpack, width_unit

from .cases import bf16, normal, random_rows, weight

KINDS = [name for name in gguf_blocks.BLOCK_SIZES if name != "F32"]


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


@pytest.mark.parametrize("activations", ["", "_a8"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_are_kept_as_they_are(kind: str, activations: str) -> None:
    rng = np.random.default_rng(3)
    parts = [random_rows(rng, kind, n, 512) for n in (20, 7, 33)]  # panels run across parts
    packed = pack(kind.lower() + activations, [GgmlRows(kind, rows) for rows in parts])
    expected = np.concatenate([gguf_blocks.dequantize(kind, rows) for rows in parts])
    assert packed.shape == (60, 512)
    assert packed.nbytes == packed_nbytes(packed.format, 60, 512)
    np.testing.assert_array_equal(unpack(packed), expected)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_packed_k_quants_are_what_the_gguf_package_says(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    rows = random_rows(np.random.default_rng(6), kind, 33, 768)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(pack(kind.lower(), [GgmlRows(kind, rows)]).dense, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("storage", ["q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k"])
def test_8_bit_activations_are_exact_on_small_integers(storage: str, isa: str) -> None:
    """Where rounding the activations changes nothing, only float sums are left between the two precisions."""
    rng = np.random.default_rng(7)
    w = weight(rng, storage, 40, 512)
    x = rng.integers(-127, 128, (11, 512)).astype(np.float32)
    x[:, ::32] = 127  # so that every block's step is one
    got = ops.linear(x, Weight(f"{storage}_a8", w.shape, w.data))
    expected = x.astype(np.float64) @ w.dense.T.astype(np.float64)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(x).sum(axis=1).max() * np.abs(w.dense).max())


@pytest.mark.parametrize("format", [f for f in FORMATS if width_unit(f) < 256 and f != "i8"])
@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_in_any_format(format: str, source: type) -> None:
    w = normal(np.random.default_rng(4), 1040, 64).astype(source)  # more rows than are converted at a time
    packed = pack(format, [w[:1030], w[1030:]])
    exact = w.astype(np.float32)
    expected = {"f32": exact, "bf16": bf16(exact)}.get(format)
    if expected is None:
        kind = storage_of(format).upper()
        expected = gguf_blocks.dequantize(kind, gguf_blocks.quantize(kind, exact))
    np.testing.assert_array_equal(unpack(packed), expected)
    assert packed.nbytes == packed_nbytes(format, 1040, 64)
    assert packed.data.ctypes.data % 64 == 0


@pytest.mark.parametrize("width", [16, 48, 64, 576, 1536, 11008])
def test_turning_keeps_products(width: int) -> None:
    x, w = (normal(np.random.default_rng(8), n, width) for n in (3, 5))
    x[0, 7] = 100.0
    np.testing.assert_allclose(rotation.rotate(x) @ rotation.rotate(w).T / width, x @ w.T, atol=2e-5 * np.abs(x).sum(axis=1).max())
    np.testing.assert_allclose(rotation.rotate(rotation.rotate(x)) / width, x, atol=1e-4)
    assert np.abs(rotation.rotate(x)[0]).max() < 0.5 * 100 * np.sqrt(width)  # spread over the row, unless the row is very short


@pytest.mark.parametrize("source", ["floats", "blocks"])
def test_one_scale_an_output(source: str) -> None:
    rng = np.random.default_rng(9)
    parts: list[np.ndarray | GgmlRows] = [normal(rng, 1030, 96), normal(rng, 10, 96)]
    exact = np.concatenate([np.asarray(part) for part in parts])
    if source == "blocks":
        parts = [GgmlRows("Q4_1", gguf_blocks.quantize("Q4_1", np.asarray(part))) for part in parts]
        exact = np.concatenate([gguf_blocks.dequantize("Q4_1", part.rows) for part in parts if isinstance(part, GgmlRows)])
    packed = pack("i8", parts)
    assert packed.nbytes == packed_nbytes("i8", 1040, 96) and packed.shape == (1040, 96)
    turned = rotation.rotate(exact)
    error = np.abs(rotation.rotate(unpack(packed)) - turned)
    assert (error <= 0.501 * np.abs(turned).max(axis=1, keepdims=True) / 127 + 1e-4).all()


def test_integers_are_exact_whatever_the_rows(isa: str) -> None:
    """A turned row of small integers is rounded to itself, so that only the scales are left."""
    rng = np.random.default_rng(10)
    w = weight(rng, "i8", 40, 192)
    turned = rng.integers(-126, 127, (29, 192)).astype(np.float32)
    turned[:, 5] = 127
    x = rotation.rotate(turned) / 192
    got = ops.linear(x, w)
    expected = turned.astype(np.float64) @ rotation.rotate(w.dense).T.astype(np.float64) / 192
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(turned).sum(axis=1).max() * np.abs(w.dense).max())


def test_other_block_types_become_floats() -> None:
    rows = random_rows(np.random.default_rng(5), "Q6_K", 16, 256)
    packed = pack("bf16", [GgmlRows("Q6_K", rows)])
    np.testing.assert_array_equal(unpack(packed), bf16(gguf_blocks.dequantize("Q6_K", rows)))


def test_bits_a_weight() -> None:
    assert packed_nbytes("q4_1", 512, 256) == 512 * 256 * 5 // 8
    assert packed_nbytes("q8_0", 512, 256) == 512 * 256 * 17 // 16
    assert packed_nbytes("q4_0", 512, 256) == 512 * 256 * 9 // 16
    assert packed_nbytes("q4_k_a8", 512, 256) == 512 * 256 * 37 // 64
    assert packed_nbytes("q5_k", 512, 256) == 512 * 256 * 45 // 64
    assert packed_nbytes("q6_k", 512, 256) == 512 * 256 * 105 // 128
    assert packed_nbytes("i8", 512, 256) == 512 * (256 + 4)


def test_what_cannot_be_packed_is_refused() -> None:
    w = np.zeros((16, 40), np.float32)
    with pytest.raises(ValueError, match="not one of f32, bf16"):
        pack("q3_k", [w])
    with pytest.raises(ValueError, match="multiple of 32"):
        pack("q8_0", [w])
    with pytest.raises(ValueError, match="multiple of 16"):
        pack("i8", [w])
    with pytest.raises(ValueError, match="multiple of 256"):
        pack("q4_k", [np.zeros((16, 96), np.float32)])
    with pytest.raises(ValueError, match="no quantizer for `Q5_K`"):
        pack("q5_k_a8", [np.zeros((16, 256), np.float32)])
    with pytest.raises(ValueError, match="different widths"):
        pack("f32", [w, np.zeros((16, 8), np.float32)])
    with pytest.raises(ValueError, match="whole number"):
        gguf_blocks.dequantize("Q8_0", np.zeros((2, 35), np.uint8))
    with pytest.raises(ValueError, match="no decoder"):
        gguf_blocks.dequantize("IQ1_S", np.zeros((2, 50), np.uint8))
