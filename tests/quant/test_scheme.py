"""Which packed format a checkpoint's rows get, and that quantizing while loading is quantizing."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from pagoda.base.mesh import Mesh
from pagoda.kernels import gguf_blocks
from pagoda.kernels.weight import storage_of
from pagoda.layers.embedding import VocabTable
from pagoda.layers.linear import Linear
from pagoda.loader.tensor import SourceTensor
from pagoda.quant.scheme import Precision, scheme_for


def floats(n: int, k: int, *, seed: int = 0) -> SourceTensor:
    w = np.random.default_rng(seed).standard_normal((n, k), np.float32).astype(ml_dtypes.bfloat16)
    return SourceTensor("w", w, (n, k))


def blocks(kind: str, n: int, k: int) -> SourceTensor:
    if kind in ("Q4_0", "Q4_1", "Q8_0"):
        rows = gguf_blocks.quantize(kind, np.asarray(floats(n, k).array, np.float32))
    else:
        rows = np.zeros((n, k // gguf_blocks.BLOCK_SIZES[kind][0] * gguf_blocks.BLOCK_SIZES[kind][1]), np.uint8)
    return SourceTensor("w", rows, (n, k), kind)


CASES = [  # stored as, quantization -> format of a matrix, of the vocabulary's table
    (None, None, "bf16", "bf16"),
    (None, "int8", "q8_0", "q8_0"),
    (None, "int4", "q4_1", "q8_0"),
    ("Q4_1", None, "q4_1", "q4_1"),
    ("Q4_1", "int8", "q8_0", "q8_0"),
    ("Q4_1", "int4", "q4_1", "q4_1"),
    ("Q8_0", "int8", "q8_0", "q8_0"),
    ("Q8_0", "int4", "q4_1", "q8_0"),
    ("Q4_K", None, "q4_k", "q4_k"),
    ("Q4_K", "int4", "q4_k", "q4_k"),
    ("Q6_K", None, "q6_k", "q6_k"),
    ("Q6_K", "int4", "q4_1", "q6_k"),
    ("Q6_K", "int8", "q8_0", "q8_0"),
    ("Q3_K", None, "bf16", "bf16"),
    ("Q3_K", "int4", "q4_1", "q8_0"),
]


@pytest.mark.parametrize("activations", ["int16", "int8"])
@pytest.mark.parametrize(("stored", "quantization", "matrix", "table"), CASES)
def test_formats(stored: str | None, quantization: str | None, matrix: str, table: str, activations: str) -> None:
    part = blocks(stored, 16, 256) if stored else floats(16, 256)
    precision = Precision("bfloat16", quantization, activations)  # type: ignore[arg-type]
    for is_table, expected in ((False, matrix), (True, table)):
        if activations == "int8" and quantization == "int8":
            expected = "i8"
        suffix = "_a8" if activations == "int8" and expected not in ("bf16", "i8") else ""
        scheme = scheme_for(part)
        assert scheme.format_of(part, precision, is_table=is_table) == expected + suffix
        assert scheme.pack([part], precision, is_table=is_table).format == expected + suffix


def test_a_width_without_blocks_stays_float() -> None:
    part = floats(16, 40)
    assert scheme_for(part).format_of(part, Precision("float32", "int8")) == "f32"


@pytest.mark.parametrize(("stored", "wanted", "kind"), [(None, "int8", "Q8_0"), (None, "int4", "Q4_1"), ("Q8_0", "int4", "Q4_1"), ("Q4_1", "int8", "Q8_0")])
def test_a_layer_quantized_while_loading_holds_the_nearest_blocks(stored: str | None, wanted: str, kind: str) -> None:
    parts = {name: blocks(stored, n, 64) if stored else floats(n, 64, seed=n) for name, n in (("q", 40), ("k", 1040), ("v", 24))}
    layer = Linear(64, {name: part.shape[0] for name, part in parts.items()}, bias=False, precision=Precision("float32", wanted), mesh=Mesh())  # type: ignore[arg-type]
    for name, part in parts.items():
        layer.take(name, part)
    exact = np.concatenate([part.as_float32() for part in parts.values()])
    expected = gguf_blocks.dequantize(kind, gguf_blocks.quantize(kind, exact))
    assert layer.formats == {storage_of(kind.lower())}
    np.testing.assert_allclose(layer(np.eye(64, dtype=np.float32)).T, expected, atol=2e-4 * np.abs(expected).max())


def test_a_table_reads_the_same_rows_it_multiplies_with() -> None:
    table = VocabTable(50, 64, precision=Precision("bfloat16", "int4", "int8"))
    part = floats(50, 64)
    table.load(part)
    assert table.formats == {"q8_0_a8"}
    expected = gguf_blocks.dequantize("Q8_0", gguf_blocks.quantize("Q8_0", part.as_float32()))
    np.testing.assert_array_equal(table.embed(np.arange(50), scale=1.0), expected)


@pytest.mark.parametrize(("stored", "wanted"), [(None, "int8"), (None, "int4"), ("Q8_0", "int4")])
def test_quantizing_never_holds_a_float_copy(stored: str | None, wanted: str) -> None:
    part = blocks(stored, 16384, 256) if stored else floats(16384, 256)
    precision = Precision("bfloat16", wanted)  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        weight = scheme_for(part).pack([part], precision)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - weight.nbytes < 0.75 * 4 * 16384 * 256


def test_block_types_without_a_kernel_are_named() -> None:
    from pagoda.quant.scheme import not_kept

    assert not_kept(["Q4_1", "Q5_0", "F32", "BF16", "Q2_K", "Q5_0", "Q6_K"]) == ["Q2_K", "Q5_0"]


def test_what_was_dequantized_is_in_the_report(tmp_path, shared_data) -> None:  # type: ignore[no-untyped-def]
    """A GGUF whose matrices are Q5_0 loads as bfloat16, and the ledger says so."""
    import numpy as np

    from pagoda.base.config import config_from_kwargs
    from pagoda.executor.launch import build_engine
    from pagoda.files.gguf import read_gguf
    from tests.files.gguf_writer import TYPE_NUMBERS, Tensor, f32, gguf_bytes

    source = read_gguf(shared_data / "weights/stories260K-f32.gguf")
    tensors = {}
    for name in source.tensors:
        array = np.asarray(source.array(name), np.float32)
        tensors[name] = f32(array)
        if name.endswith("attn_q.weight"):
            rows = np.zeros((array.shape[0], array.shape[1] // 32 * 22), np.uint8)
            tensors[name] = Tensor(TYPE_NUMBERS["Q5_0"], array.shape, rows.tobytes())
    path = tmp_path / "mixed.gguf"
    path.write_bytes(gguf_bytes(dict(source.metadata), tensors))
    lines = build_engine(config_from_kwargs(str(path), kv_cache_memory_bytes=16 << 20, max_model_len=64)).ledger.lines()
    assert any("dequantized" in line and "Q5_0" in line for line in lines)

