"""The safetensors reader against the public package, and that damage raises ModelFileError and nothing else."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagoda.base.errors import ModelFileError, ModelNotFound
from pagoda.files.safetensors import read_safetensors

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "c": np.arange(5, dtype=np.float16),
    "d": np.array(7, dtype=np.int64),
    "e": np.zeros((0, 4), np.int8),
}
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int8": "I8"}


def st_bytes(arrays: dict[str, np.ndarray], **changes: Any) -> bytes:
    """A file; `changes` replace whole entries of the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    encoded = json.dumps(header | changes).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_reads_what_was_written(tmp_path: Path) -> None:
    file = read_safetensors(write(tmp_path / "m.safetensors", st_bytes(ARRAYS)))
    assert file.metadata == {"format": "pt"}
    for name, array in ARRAYS.items():
        read = file.array(name)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
        assert file.raw(name).tobytes() == array.tobytes()
        file.drop(name)


def test_reads_what_the_public_package_writes(tmp_path: Path) -> None:
    theirs = pytest.importorskip("safetensors.numpy")
    arrays = {name: array for name, array in ARRAYS.items() if array.dtype != ml_dtypes.bfloat16}
    theirs.save_file(arrays, tmp_path / "model.safetensors")
    file = read_safetensors(tmp_path)
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.array(name), array)


def test_sharded(tmp_path: Path) -> None:
    first, second = {"a.weight": ARRAYS["a.weight"]}, {"b": ARRAYS["b"], "c": ARRAYS["c"]}
    write(tmp_path / "m-1.safetensors", st_bytes(first))
    write(tmp_path / "m-2.safetensors", st_bytes(second))
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {"a.weight": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    file = read_safetensors(tmp_path)
    for name in weight_map:
        np.testing.assert_array_equal(file.array(name), ARRAYS[name])

    for changed, message in [
        ({"z": "m-1.safetensors"}, "where the index puts it"),
        ({"z": "m-3.safetensors"}, "missing: m-3.safetensors"),
        ({"z": "../m-1.safetensors"}, "not the name of a file in the folder"),
        ({"z": "weights.bin"}, "not a safetensors file"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map | changed}))
        with pytest.raises(ModelFileError, match=message):
            read_safetensors(tmp_path)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (entry(dtype="F7"), "dtype `F7`"),
        (entry(shape=[3, 5]), "its shape needs 60"),
        (entry(shape=[-3, -4]), "list of sizes"),
        (entry(shape=[2**70]), "list of sizes"),
        (entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), "list of sizes"),
        (entry(data_offsets=[0, 47]), "47 bytes are stored"),
        (entry(data_offsets=[48, 0]), "ascending"),
        (entry(data_offsets=[10**6, 10**6 + 48]), "incomplete"),
        (entry(data_offsets=[12, 60]), "overlaps"),
        ([], "not an object"),
    ],
)
def test_damage_is_named(tmp_path: Path, changes: Any, message: str) -> None:
    path = write(tmp_path / "m.safetensors", st_bytes(ARRAYS, **{"a.weight": changes}))
    with pytest.raises(ModelFileError, match=message) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 12) + b'{"a":1,"a":2',
        struct.pack("<Q", 60000) + b"[" * 60000,
    ],
)
def test_bad_headers(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ModelFileError):
        read_safetensors(write(tmp_path / "m.safetensors", data))


def test_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no \*.safetensors"):
        read_safetensors(tmp_path)
    write(tmp_path / "pytorch_model.bin", b"x")
    with pytest.raises(ModelNotFound, match=r"pickle.*convert them to safetensors"):
        read_safetensors(tmp_path)


GOOD = st_bytes(ARRAYS)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
    length=st.one_of(st.just(len(GOOD)), st.integers(0, len(GOOD))),
)
def test_random_damage_raises_only_model_file_error(tmp_path: Path, edits: list[tuple[int, int]], length: int) -> None:
    data = bytearray(GOOD)
    for position, byte in edits:
        data[position] = byte
    path = write(tmp_path / "m.safetensors", bytes(data[:length]))
    try:
        file = read_safetensors(path)
        for name in file.tensors:
            file.raw(name).sum()
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
        path = write(tmp_path / "damaged.safetensors", bytes(data))
        try:
            file = read_safetensors(path)
            for name in file.tensors:
                file.raw(name).sum()
        except ModelFileError:
            continue
