"""Writes small GGUF files for tests, and lets a test say wrong things in them on purpose."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

from pagoda.files.ggml_types import GGML_TYPES

TYPE_NUMBERS = {type.name: number for number, type in GGML_TYPES.items()}


class Tensor(NamedTuple):
    """`offset` None: placed behind the previous tensor, aligned."""

    type: int
    shape: tuple[int, ...]
    data: bytes
    offset: int | None = None


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<IQ", 10, item) if item >= 0 else struct.pack("<Iq", 11, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item, np.ndarray):
        numbers = {"float32": 6, "int32": 5, "uint32": 4, "bool": 7}
        return struct.pack("<IIQ", 9, numbers[item.dtype.name], item.size) + item.tobytes()
    return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(string(text) for text in item)


def f32(array: np.ndarray) -> Tensor:
    return Tensor(TYPE_NUMBERS["F32"], array.shape, array.astype("<f4").tobytes())


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, Tensor], *, version: int = 3, alignment: int = 32) -> bytes:
    """The bytes of a file. `metadata` may hold any value `value` knows."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, item in metadata.items():
        header += string(key) + value(item)
    data = b""
    for name, tensor in tensors.items():
        offset = len(data) if tensor.offset is None else tensor.offset
        dims = tensor.shape[::-1]
        header += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset)
        data += tensor.data + b"\0" * (-len(tensor.data) % alignment)
    return header + b"\0" * (-len(header) % alignment) + data
