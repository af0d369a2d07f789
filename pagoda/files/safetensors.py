"""safetensors files, single or sharded: the JSON header is checked, tensors are views of a memory map.

    +------------+--------------------------------------------------------+-------------+
    | u64 length | {"name": {"dtype", "shape", "data_offsets": [a, b]}, ..}| tensor data |
    +------------+--------------------------------------------------------+-------------+

`data_offsets` count from the first byte behind the header. A sharded model has `model.safetensors.index.json`, whose
`weight_map` names the file of each tensor. Whatever the bytes are, the only error that escapes is `ModelFileError`.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from pagoda.base.errors import ModelFileError, ModelNotFound
from pagoda.files.formats import PICKLE_SUFFIXES
from pagoda.files.mapped import MappedFile, TensorInfo, check_layout

__all__ = ["SafetensorsFile", "read_safetensors"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_NBYTES = 100_000_000
_MAX_DIMS = 16
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


class SafetensorsFile:
    """The tensors of one model, in one file or many. `metadata` is the first file's `__metadata__`."""

    def __init__(self, path: Path, metadata: dict[str, str], shards: list[MappedFile], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._shards = shards

    @property
    def nbytes(self) -> int:
        """Size of all the files."""
        return sum(shard.size for shard in self._shards)

    def array(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the file, in its own dtype."""
        info = self._info(name)
        return self._shards[info.shard].view(info, _DTYPES[info.dtype], info.shape)

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, uint8 (rows, bytes of a row)."""
        info = self._info(name)
        num_rows = int(np.prod(info.shape[:-1], dtype=np.int64))
        return self._shards[info.shard].view(info, np.dtype("u1"), (num_rows, info.nbytes // max(num_rows, 1)))

    def drop(self, name: str) -> None:
        """Give the pages of this tensor back to the system; reading it again is allowed."""
        info = self._info(name)
        self._shards[info.shard].drop(info)

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFileError("there is no such tensor in the model", path=self.path, tensor=name) from None


def read_safetensors(path: str | Path) -> SafetensorsFile:
    """Open a `.safetensors` file, or the folder of a model.

    A folder is read through its index where there is one, else `model.safetensors`, else its only safetensors file.
    Raises ModelNotFound where there is none (naming pickle files, which are refused), ModelFileError where one
    is truncated or corrupt.
    """
    path = Path(path)
    if not path.is_dir():
        return _open(path, [path], None)
    if (path / _INDEX).exists():
        weight_map = _read_index(path / _INDEX)
        paths = [path / name for name in sorted(set(weight_map.values()))]
        missing = [shard.name for shard in paths if not shard.exists()]
        if missing:
            raise ModelFileError(f"files named in {_INDEX} are missing: {', '.join(missing[:4])}", path=path)
        return _open(path, paths, weight_map)
    if (path / _SINGLE).exists():
        return _open(path, [path / _SINGLE], None)
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return _open(path, found, None)
    if found:
        raise ModelFileError(f"{len(found)} safetensors files and no {_INDEX} to say which belong together", path=path)
    raise _no_weights(path)


def _no_weights(path: Path) -> ModelNotFound:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        return ModelNotFound(
            f"the only weights are pickle files ({', '.join(pickles[:3])}), which are refused because loading one "
            "runs whatever code it holds; convert them to safetensors",
            path=path,
        )
    return ModelNotFound("there are no *.safetensors files in the folder", path=path)


def _read_index(path: Path) -> dict[str, str]:
    """The tensor -> file name map; a name that leaves the folder is refused."""
    weight_map = _parse_json(path, path.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError("the index has no `weight_map`; fetch it again", path=path)
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or file_name in ("", ".", ".."):
            raise ModelFileError(f"`{file_name}` is not the name of a file in the folder", path=path, tensor=name)
        if not file_name.endswith(".safetensors"):
            raise ModelFileError(f"`{file_name}` is not a safetensors file", path=path, tensor=name)
    return weight_map


def _open(path: Path, paths: list[Path], weight_map: dict[str, str] | None) -> SafetensorsFile:
    shards: list[MappedFile] = []
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for index, shard_path in enumerate(paths):
        shard = MappedFile(shard_path)
        shards.append(shard)
        shard_metadata, infos = _read_header(shard, index)
        metadata = metadata or shard_metadata
        for info in infos:
            if weight_map is not None and weight_map.get(info.name) != shard_path.name:
                continue
            tensors[info.name] = info
    absent = [name for name in weight_map or () if name not in tensors]
    if absent:
        assert weight_map is not None
        raise ModelFileError(f"not in {weight_map[absent[0]]}, where the index puts it", path=path, tensor=absent[0])
    return SafetensorsFile(path, metadata, shards, tensors)


def _read_header(file: MappedFile, shard: int) -> tuple[dict[str, str], list[TensorInfo]]:
    if file.size < 8:
        raise ModelFileError("too short to be a safetensors file; fetch it again", path=file.path)
    (nbytes,) = struct.unpack_from("<Q", file.buffer, 0)
    if nbytes > min(file.size - 8, _MAX_HEADER_NBYTES):
        raise ModelFileError(
            f"the header claims {nbytes} bytes, the file has {file.size}; it is incomplete or not safetensors, fetch it again",
            path=file.path,
        )
    header = _parse_json(file.path, file.buffer[8 : 8 + nbytes])
    metadata = header.pop("__metadata__", {})
    infos = [_tensor_info(file, name, entry, 8 + nbytes, shard) for name, entry in header.items()]
    check_layout(infos, file.size, file.path)
    return metadata if isinstance(metadata, dict) else {}, infos


def _tensor_info(file: MappedFile, name: str, entry: Any, start: int, shard: int) -> TensorInfo:
    def fail(message: str) -> ModelFileError:
        return ModelFileError(message, path=file.path, tensor=name)

    if not isinstance(entry, dict):
        raise fail("its description is not an object; the file is corrupt")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise fail(f"dtype `{dtype}` is not known; convert it to one of {', '.join(_DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS or math.prod(max(size, 1) for size in shape) >= 2**60:
        raise fail("its shape is not a list of sizes; the file is corrupt")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise fail("its data_offsets are not two ascending numbers; the file is corrupt")
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise fail(f"{offsets[1] - offsets[0]} bytes are stored where its shape needs {needed}; the file is corrupt")
    return TensorInfo(name, dtype, tuple(shape), start + offsets[0], needed, shard)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """A JSON object without duplicate names."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name is there twice")
        return table

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"the header is not valid JSON ({error}); fetch the file again", path=path) from error
    if not isinstance(value, dict):
        raise ModelFileError("the header is not a JSON object; fetch the file again", path=path)
    return value
