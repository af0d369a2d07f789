"""GGUF files, versions 2 and 3: metadata and tensor descriptions over a memory map, every step bounds-checked.

    +--------+---------+-----------+----------+------------------+---------------------+-----+-------------------+
    | "GGUF" | version | n_tensors | n_values | key-value pairs  | tensor descriptions | pad | tensor data       |
    |  4 B   | u32     | u64       | u64      | key, type, value | name, dims, type,   | to  | each at a multiple|
    |        |         |           |          |                  | offset into data    | A   | of A = alignment  |
    +--------+---------+-----------+----------+------------------+---------------------+-----+-------------------+

Strings are a u64 length and UTF-8 bytes; arrays a u32 type, a u64 count and the values. Everything is little-endian.
A vocabulary is an array of a hundred thousand strings, so arrays are only walked over when the file is opened and
decoded when somebody asks for them. A model may be split into `NAME-00001-of-0000N.gguf`; the first file is named,
its siblings are found.

Whatever the bytes are, the only error that escapes is `ModelFileError`, and nothing outside the file is read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pagoda.base.errors import ModelFileError
from pagoda.files.ggml_types import GGML_TYPES
from pagoda.files.mapped import MappedFile, TensorInfo, check_layout

__all__ = ["GgufFile", "GgufMetadata", "read_gguf"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 8
_MAX_NAME_NBYTES = 65535
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf$")

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[Any]] = {
    number: np.dtype(code)
    for number, code in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
_ARRAY_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class _Span(NamedTuple):
    """An undecoded value: its type, the type of its items where it is an array, their number (bytes of a string) and first byte."""

    type: int
    item_type: int
    length: int
    offset: int


class _Reader:
    """A cursor over the header. Every method moves it forward, and raises ModelFileError at the file's end."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.pos = 0

    def fail(self, message: str) -> ModelFileError:
        return ModelFileError(f"{message} (byte {self.pos}); the file is corrupt, fetch it again", path=self.file.path)

    def skip(self, nbytes: int) -> int:
        """Move over `nbytes`; returns where they begin."""
        start = self.pos
        if nbytes > self.file.size - start:
            raise ModelFileError(
                f"the header ends at byte {self.file.size}, inside a value; the download is incomplete, fetch the file again",
                path=self.file.path,
            )
        self.pos = start + nbytes
        return start

    def u32(self) -> int:
        value: int = _U32.unpack_from(self.file.buffer, self.skip(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack_from(self.file.buffer, self.skip(8))[0]
        return value

    def name(self, what: str) -> str:
        nbytes = self.u64()
        if nbytes > _MAX_NAME_NBYTES:
            raise self.fail(f"a {what} of {nbytes} bytes")
        start = self.skip(nbytes)
        try:
            return self.file.buffer[start : self.pos].decode()
        except UnicodeDecodeError:
            raise self.fail(f"a {what} is not UTF-8") from None

    def strings(self, count: int) -> None:
        """Walk over `count` strings. The loop of the whole header: a vocabulary has one string per token."""
        buffer, size, pos, unpack = self.file.buffer, self.file.size, self.pos, _U64.unpack_from
        if count > (size - pos) // 8:
            raise self.fail(f"an array of {count} strings does not fit in the file")
        for _ in range(count):
            if pos + 8 > size:
                break
            pos += 8 + unpack(buffer, pos)[0]
        else:
            if pos <= size:
                self.pos = pos
                return
        raise self.fail("an array of strings runs past the end of the file")

    def value(self, type: int) -> _Span:
        """Walk over one value of metadata."""
        if type in _SCALARS:
            return _Span(type, type, 1, self.skip(_SCALARS[type].itemsize))
        if type == _STRING:
            nbytes = self.u64()
            return _Span(type, type, nbytes, self.skip(nbytes))
        if type != _ARRAY:
            raise self.fail(f"unknown value type {type}")
        item_type, count = self.u32(), self.u64()
        start = self.pos
        if item_type == _STRING:
            self.strings(count)
        elif item_type in _SCALARS:
            self.skip(count * _SCALARS[item_type].itemsize)
        else:
            raise self.fail(f"an array of type {item_type}, which is not known")
        return _Span(type, item_type, count, start)


class GgufMetadata(Mapping[str, Any]):
    """The key-value pairs of a file, decoded when asked for.

    Numbers come as int, float or bool, strings as str, arrays of strings as list[str], arrays of numbers as
    read-only numpy arrays.
    """

    def __init__(self, file: MappedFile, spans: dict[str, _Span]) -> None:
        self._file = file
        self._spans = spans
        self._decoded: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __contains__(self, key: object) -> bool:
        return key in self._spans

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            self._decoded[key] = self._decode(key, self._spans[key])
        return self._decoded[key]

    def nbytes_at(self, key: str) -> memoryview | None:
        """The encoded bytes of an array of strings, for hashing without decoding; None where the key is absent."""
        span = self._spans.get(key)
        if span is None:
            return None
        reader = _Reader(self._file)
        reader.pos = span.offset
        if span.type == _ARRAY and span.item_type == _STRING:
            reader.strings(span.length)
        else:
            reader.skip(span.length * (1 if span.type == _STRING else _SCALARS[span.item_type].itemsize))
        return memoryview(self._file.buffer)[span.offset : reader.pos]

    def get_int(self, key: str, default: int | None = None) -> int | None:
        """The integer at `key`, `default` where there is none. Raises ModelFileError where it is something else."""
        value = self.get(key, default)
        return default if value is None else self._checked(key, value, int, "an integer")

    def get_float(self, key: str, default: float | None = None) -> float | None:
        """The number at `key` as a float; as `get_int`."""
        value = self.get(key, default)
        return default if value is None else float(self._checked(key, value, (int, float), "a number"))

    def get_str(self, key: str, default: str | None = None) -> str | None:
        """The string at `key`; as `get_int`."""
        value = self.get(key, default)
        return default if value is None else self._checked(key, value, str, "a string")

    def get_bool(self, key: str, default: bool) -> bool:
        """The boolean at `key`; as `get_int`."""
        value: bool = self._checked(key, self.get(key, default), bool, "a boolean")
        return value

    def get_strings(self, key: str) -> list[str]:
        """The list of strings at `key`, empty where there is none."""
        value: list[str] = self._checked(key, self.get(key, []), list, "an array of strings")
        return value

    def get_numbers(self, key: str) -> np.ndarray | None:
        """The array of numbers at `key`, None where there is none."""
        value = self.get(key)
        return None if value is None else self._checked(key, value, np.ndarray, "an array of numbers")

    def _checked(self, key: str, value: Any, type: Any, what: str) -> Any:
        if not isinstance(value, type) or (isinstance(value, bool) and type is not bool):
            raise ModelFileError(f"metadata `{key}` is not {what}; the file is corrupt", path=self._file.path)
        return value

    def _decode(self, key: str, span: _Span) -> Any:
        buffer = self._file.buffer
        try:
            if span.type == _STRING:
                return buffer[span.offset : span.offset + span.length].decode()
            if span.item_type == _STRING:
                return self._strings(span)
        except UnicodeDecodeError:
            raise ModelFileError(f"metadata `{key}` is not UTF-8; the file is corrupt", path=self._file.path) from None
        dtype = _SCALARS[span.item_type]
        if span.type != _ARRAY:
            return np.frombuffer(buffer, dtype, 1, span.offset)[0].item()
        return np.frombuffer(buffer, dtype, span.length, span.offset) if span.length else np.empty(0, dtype)

    def _strings(self, span: _Span) -> list[str]:
        """The walk has been checked when the file was opened, so the loop needs no bounds."""
        buffer, pos, unpack = self._file.buffer, span.offset, _U64.unpack_from
        strings = []
        for _ in range(span.length):
            start = pos + 8
            pos = start + unpack(buffer, pos)[0]
            strings.append(buffer[start:pos].decode())
        return strings


class GgufFile:
    """One GGUF model, split or not. `metadata` is the first file's; `tensors` are all files'."""

    def __init__(self, path: Path, metadata: GgufMetadata, shards: list[MappedFile], tensors: dict[str, TensorInfo]):
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._shards = shards

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`, which prefixes the keys of the hyper-parameters."""
        name = self.metadata.get_str("general.architecture")
        if not name:
            raise ModelFileError("there is no `general.architecture`; this is not a model", path=self.path)
        return name

    @property
    def nbytes(self) -> int:
        """Size of all the files."""
        return sum(shard.size for shard in self._shards)

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, uint8 (rows, bytes of a row), a read-only view of the file."""
        info = self._info(name)
        num_rows = _product(info.shape[:-1])
        return self._shards[info.shard].view(info, np.dtype("u1"), (num_rows, info.nbytes // max(num_rows, 1)))

    def array(self, name: str) -> np.ndarray:
        """A tensor of an unquantized type as a read-only view; ModelFileError for block types (see `raw`)."""
        info = self._info(name)
        if info.dtype not in _ARRAY_DTYPES:
            raise ModelFileError(f"type {info.dtype} is stored in blocks; read it raw", path=self.path, tensor=name)
        return self._shards[info.shard].view(info, _ARRAY_DTYPES[info.dtype], info.shape)

    def drop(self, name: str) -> None:
        """Give the pages of this tensor back to the system; reading it again is allowed."""
        info = self._info(name)
        self._shards[info.shard].drop(info)

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFileError("there is no such tensor in the model", path=self.path, tensor=name) from None


def read_gguf(path: str | Path) -> GgufFile:
    """Open a GGUF model; of a split one, any of its files may be named. Raises ModelFileError."""
    path = Path(path)
    paths = _shard_paths(path)
    shards, tensors = [], {}
    first: GgufMetadata | None = None
    for index, shard_path in enumerate(paths):
        metadata, infos = _read_header(MappedFile(shard_path), index)
        first = first if first is not None else metadata
        shards.append(metadata._file)
        for info in infos:
            if info.name in tensors:
                raise ModelFileError("the tensor is stored twice", path=shard_path, tensor=info.name)
            tensors[info.name] = info
    assert first is not None
    num_files = first.get_int("split.count", 1)
    if num_files not in (0, len(paths)):
        raise ModelFileError(
            f"this is one of {num_files} files of a split model; keep their names `...-00001-of-{num_files:05d}.gguf` "
            "and put them in one folder",
            path=path,
        )
    return GgufFile(path, first, shards, tensors)


def _shard_paths(path: Path) -> list[Path]:
    match = _SHARD.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    names = [f"{match['stem']}-{index:05d}-of-{count:05d}.gguf" for index in range(1, count + 1)]
    paths = [path.with_name(name) for name in names]
    missing = [candidate.name for candidate in paths if not candidate.exists()]
    if missing or path not in paths:
        raise ModelFileError(f"of {count} files of the model these are missing: {', '.join(missing[:4])}", path=path)
    return paths


def _read_header(file: MappedFile, shard: int) -> tuple[GgufMetadata, list[TensorInfo]]:
    reader = _Reader(file)
    magic = bytes(file.buffer[: reader.skip(4) + 4])
    if magic != _MAGIC:
        raise ModelFileError("this is not a GGUF file (its first bytes are not `GGUF`)", path=file.path)
    version = reader.u32()
    if version not in _VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        what = "a big-endian file" if big_endian else f"GGUF version {version}"
        raise ModelFileError(f"{what} is not supported; convert it to little-endian version 3", path=file.path)
    num_tensors, num_values = reader.u64(), reader.u64()
    spans: dict[str, _Span] = {}
    for _ in range(_plausible(reader, num_values, 13, "metadata values")):
        key = reader.name("metadata key")
        if key in spans:
            raise reader.fail(f"metadata `{key}` is there twice")
        spans[key] = reader.value(reader.u32())
    metadata = GgufMetadata(file, spans)
    return metadata, _read_tensor_infos(reader, metadata, num_tensors, shard)


def _read_tensor_infos(reader: _Reader, metadata: GgufMetadata, num_tensors: int, shard: int) -> list[TensorInfo]:
    file = reader.file
    alignment = metadata.get_int("general.alignment", _DEFAULT_ALIGNMENT) or 0
    if alignment <= 0 or alignment & (alignment - 1):
        raise reader.fail(f"`general.alignment` is {alignment}, not a power of two")
    infos: dict[str, TensorInfo] = {}
    for _ in range(_plausible(reader, num_tensors, 24, "tensors")):
        info = _read_tensor_info(reader, alignment, shard)
        if info.name in infos:
            raise ModelFileError("the tensor is described twice", path=file.path, tensor=info.name)
        infos[info.name] = info
    start = -(-reader.pos // alignment) * alignment
    placed = [info._replace(offset=start + info.offset) for info in infos.values()]
    check_layout(placed, file.size, file.path)
    return placed


def _read_tensor_info(reader: _Reader, alignment: int, shard: int) -> TensorInfo:
    """One description; its offset still counts from the start of the data."""
    name, path = reader.name("tensor name"), reader.file.path
    num_dims = reader.u32()
    if not 1 <= num_dims <= _MAX_DIMS:
        raise ModelFileError(f"{num_dims} dimensions; 1 to {_MAX_DIMS} are possible", path=path, tensor=name)
    shape = tuple(reader.u64() for _ in range(num_dims))[::-1]
    number, offset = reader.u32(), reader.u64()
    if 0 in shape:
        raise ModelFileError("a dimension is zero; the file is corrupt", path=path, tensor=name)
    if number not in GGML_TYPES:
        known = ", ".join(type.name for type in GGML_TYPES.values())
        raise ModelFileError(
            f"block type number {number} is not known; convert the model to one of {known}", path=path, tensor=name
        )
    type = GGML_TYPES[number]
    if shape[-1] % type.block_size:
        raise ModelFileError(
            f"rows of {shape[-1]} values are no multiple of the {type.block_size} of {type.name}", path=path, tensor=name
        )
    if offset % alignment:
        raise ModelFileError(f"offset {offset} is no multiple of the alignment {alignment}", path=path, tensor=name)
    nbytes = _product(shape) // type.block_size * type.block_nbytes
    return TensorInfo(name, type.name, shape, offset, nbytes, shard)


def _plausible(reader: _Reader, count: int, min_nbytes: int, what: str) -> int:
    if count > (reader.file.size - reader.pos) // min_nbytes:
        raise reader.fail(f"{count} {what} do not fit in the file")
    return count


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
