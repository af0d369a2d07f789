"""The GGUF reader: what it reads, and that a damaged file raises ModelFileError and nothing else."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagoda.base.errors import ModelFileError
from pagoda.files.ggml_types import GGML_TYPES
from pagoda.files.gguf import GgufFile, read_gguf
from tests.files.gguf_writer import TYPE_NUMBERS, Tensor, f32, gguf_bytes, string

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "eps": 0.5,
    "flag": True,
    "negative": -7,
    "tokens": ["a", "", "grün", "x" * 300],
    "scores": np.arange(4, dtype=np.float32),
    "empty": [],
}
MATRIX = np.arange(64 * 3, dtype=np.float32).reshape(3, 64)
Q8 = Tensor(TYPE_NUMBERS["Q8_0"], (2, 64), bytes(range(136)))
TENSORS = {"a": f32(MATRIX), "b": Q8, "c": f32(np.ones(5, np.float32))}


def write(tmp_path: Path, data: bytes, name: str = "m.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def touch_everything(file: GgufFile) -> None:
    """Use every byte that the header promises."""
    for key in file.metadata:
        file.metadata[key]
    for name in file.tensors:
        file.raw(name).sum()
        file.drop(name)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 128])
def test_reads_what_was_written(tmp_path: Path, version: int, alignment: int) -> None:
    metadata = METADATA | {"general.alignment": alignment}
    file = read_gguf(write(tmp_path, gguf_bytes(metadata, TENSORS, version=version, alignment=alignment)))
    assert file.architecture == "llama"
    assert file.metadata["tokens"] == METADATA["tokens"]
    assert file.metadata["scores"].tolist() == [0, 1, 2, 3]
    assert [file.metadata[key] for key in ("llama.block_count", "eps", "flag", "negative", "empty")] == [2, 0.5, True, -7, []]
    np.testing.assert_array_equal(file.array("a"), MATRIX)
    assert file.raw("b").shape == (2, 68) and file.raw("b").tobytes() == Q8.data
    assert file.array("c").shape == (5,)
    assert all(info.offset % alignment == 0 for info in file.tensors.values())
    file.drop("a")
    np.testing.assert_array_equal(file.array("a"), MATRIX)


def test_views_are_read_only_and_outlive_the_file(tmp_path: Path) -> None:
    array = read_gguf(write(tmp_path, gguf_bytes(METADATA, TENSORS))).array("a")
    with pytest.raises(ValueError):
        array[0, 0] = 1
    np.testing.assert_array_equal(array, MATRIX)


def test_typed_getters(tmp_path: Path) -> None:
    metadata = read_gguf(write(tmp_path, gguf_bytes(METADATA, {}))).metadata
    assert metadata.get_int("llama.block_count") == 2 and metadata.get_int("none", 9) == 9
    assert metadata.get_float("eps") == 0.5 and metadata.get_float("llama.block_count") == 2.0
    assert metadata.get_bool("flag", False) is True and metadata.get_strings("none") == []
    for wrong in (lambda: metadata.get_int("flag"), lambda: metadata.get_str("eps"), lambda: metadata.get_strings("scores")):
        with pytest.raises(ModelFileError, match="metadata"):
            wrong()


def test_block_types_agree_with_the_public_package() -> None:
    gguf = pytest.importorskip("gguf")
    for number, type in GGML_TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (theirs.name, *gguf.GGML_QUANT_SIZES[theirs]) == tuple(type)


def one(type: int = 0, shape: tuple[int, ...] = (4,), size: int = 16, offset: int | None = None) -> dict[str, Tensor]:
    return {"w": Tensor(type, shape, bytes(size), offset)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(60), "not a GGUF file"),
        (b"GG", "incomplete"),
        (gguf_bytes({}, {}, version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "do not fit"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "do not fit"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<I", 77) + bytes(64), "value type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 8, 2**61) + bytes(64), "strings"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "array of type 9"),
        (gguf_bytes({"general.alignment": 24}, {}), "power of two"),
        (gguf_bytes({}, one(type=5)), "block type number 5"),
        (gguf_bytes({}, one(type=8, shape=(2, 33))), "no multiple of the 32"),
        (gguf_bytes({}, one(offset=8)), "alignment"),
        (gguf_bytes({}, one(offset=2**62)), "incomplete"),
        (gguf_bytes({}, one(shape=(2**40, 2**40))), "incomplete"),
        (gguf_bytes({}, one(shape=())), "dimensions"),
        (gguf_bytes({}, one(shape=(2**62, 0))), "a dimension is zero"),
        (gguf_bytes({}, one() | {"v": Tensor(0, (4,), b"", 0)}), "overlaps"),
        (gguf_bytes(METADATA, TENSORS)[:-64], "incomplete"),
        (gguf_bytes({}, {"w": f32(MATRIX)}).replace(b"\1\0\0\0\0\0\0\0w", b"\1\0\0\0\0\0\0\0\xff"), "UTF-8"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_wrong_names_and_types(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path, gguf_bytes(METADATA, TENSORS)))
    with pytest.raises(ModelFileError, match="`none`"):
        file.raw("none")
    with pytest.raises(ModelFileError, match="Q8_0"):
        file.array("b")
    with pytest.raises(ModelFileError, match="cannot open"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="empty"):
        read_gguf(write(tmp_path, b"", "empty.gguf"))


def test_split_models(tmp_path: Path) -> None:
    parts = [{"a": f32(MATRIX)}, {"b": Q8}]
    for index, tensors in enumerate(parts):
        metadata = (METADATA if index == 0 else {}) | {"split.count": 2, "split.no": index}
        write(tmp_path, gguf_bytes(metadata, tensors), f"m-{index + 1:05d}-of-00002.gguf")
    for index in (1, 2):
        file = read_gguf(tmp_path / f"m-0000{index}-of-00002.gguf")
        assert file.architecture == "llama"
        np.testing.assert_array_equal(file.array("a"), MATRIX)
        assert file.raw("b").tobytes() == Q8.data
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "m2.gguf")
    with pytest.raises(ModelFileError, match="m-00002-of-00002"):
        read_gguf(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ModelFileError, match="one of 2 files"):
        read_gguf(tmp_path / "m2.gguf")


GOOD = gguf_bytes(METADATA, TENSORS)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
    length=st.one_of(st.just(len(GOOD)), st.integers(0, len(GOOD))),
)
def test_random_damage_raises_only_model_file_error(tmp_path: Path, edits: list[tuple[int, int]], length: int) -> None:
    data = bytearray(GOOD)
    for position, byte in edits:
        data[position] = byte
    path = write(tmp_path, bytes(data[:length]))
    try:
        touch_everything(read_gguf(path))
    except ModelFileError:
        return


@pytest.mark.long
def test_much_damage_raises_only_model_file_error(tmp_path: Path) -> None:
    """Bytes changed, sizes replaced by extreme ones, pieces cut out, doubled and swapped."""
    rng = random.Random(0)
    for _ in range(40_000):
        data = bytearray(GOOD)
        for _ in range(rng.randint(1, 6)):
            at, kind = rng.randrange(len(data)), rng.randrange(5)
            size = rng.choice((1, 2, 4, 8, 32))
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                data[at : at + 8] = rng.choice((0, 1, 2**31 - 1, 2**32, 2**62, 2**63, 2**64 - 1)).to_bytes(8, "little")
            elif kind == 2 and len(data) > size:
                del data[at : at + size]
            elif kind == 3:
                data[at:at] = data[at : at + size]
            else:
                other = rng.randrange(len(data))
                data[at], data[other] = data[other], data[at]
        path = write(tmp_path, bytes(data), "damaged.gguf")
        try:
            touch_everything(read_gguf(path))
        except ModelFileError:
            continue


def test_real_file(shared_data: Path) -> None:
    file = read_gguf(shared_data / "weights" / "stories260K-f32.gguf")
    assert file.architecture == "llama"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == file.array("token_embd.weight").shape[0] == 512
