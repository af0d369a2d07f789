"""Streams a checkpoint into a model: map a tensor, pack it, drop its source pages, take the next.

Peak memory is the packed weights plus the largest layer's source tensors; nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from pagoda.base.errors import ModelFileError
from pagoda.files.gguf import GgufFile
from pagoda.files.safetensors import SafetensorsFile
from pagoda.loader.names import NameMap
from pagoda.loader.slot import Slot
from pagoda.loader.tensor import SourceTensor

__all__ = ["load_dummy", "load_weights"]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
Transform = Callable[[str, SourceTensor], SourceTensor]
"""(our name, tensor) -> tensor: rows put in the order our layers expect."""


def load_weights(
    slots: Mapping[str, Slot],
    files: GgufFile | SafetensorsFile,
    names: NameMap,
    *,
    transform: Transform | None = None,
    progress: Progress | None = None,
) -> None:
    """Fills every slot. Raises ModelFileError for tensors that are missing, unknown, or of a wrong shape."""
    done = 0
    pending: dict[str, str] = {}  # source pages in use until their layer is packed: tensor -> our name
    for name in files.tensors:
        try:
            ours = names(name)
        except KeyError:
            raise ModelFileError("is not a tensor of this architecture", path=files.path, tensor=name) from None
        if ours is not None and ours in slots:
            source = _source(files, name)
            try:
                slots[ours].load(transform(ours, source) if transform else source)
            except ModelFileError as error:
                raise ModelFileError(str(error), path=files.path) from None
            pending[name] = ours
        elif ours is not None and ours not in _ALLOWED_EXTRA:
            raise ModelFileError("has no place in the model its config describes", path=files.path, tensor=name)
        done += files.tensors[name].nbytes
        _drop_packed(files, pending, slots)
        if progress:
            progress(done, files.nbytes)
    _check_complete(slots, files)


_ALLOWED_EXTRA = ("head.weight",)
"""Tied checkpoints may carry a copy of the embedding as a head."""


def _source(files: GgufFile | SafetensorsFile, name: str) -> SourceTensor:
    info = files.tensors[name]
    block_type = info.dtype if isinstance(files, GgufFile) and info.dtype not in _PLAIN else None
    array = files.raw(name) if block_type else files.array(name)
    return SourceTensor(name, array, tuple(info.shape), block_type)


_PLAIN = ("F32", "F16", "BF16", "F64")


def _drop_packed(files: GgufFile | SafetensorsFile, pending: dict[str, str], slots: Mapping[str, Slot]) -> None:
    for name in [name for name, ours in pending.items() if slots[ours].is_packed]:
        files.drop(name)
        del pending[name]


def _check_complete(slots: Mapping[str, Slot], files: GgufFile | SafetensorsFile) -> None:
    missing = [name for name, slot in slots.items() if not slot.is_loaded and not slot.is_optional]
    if missing:
        shown = ", ".join(f"`{name}`" for name in missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ModelFileError(f"lacks the tensors for {shown}; the file is incomplete or of another architecture", path=files.path)


_TILE = 4_194_301  # a prime, so that rows differ


def load_dummy(slots: Mapping[str, Slot], *, seed: int = 0, is_tiled: bool = False) -> None:
    """Random weights of the right shapes, for measuring speed: norms are one, the rest small and normal.

    `is_tiled` repeats one piece of four million numbers, in bfloat16: a large model is there in seconds.
    """
    rng = np.random.default_rng(seed)
    tile = (rng.standard_normal(_TILE, dtype=np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16) if is_tiled else None
    for name, slot in slots.items():
        if len(slot.shape) == 1:
            array = np.ones(slot.shape, np.float32) if name.endswith("norm.weight") else np.zeros(slot.shape, np.float32)
        elif tile is not None:
            array = np.resize(tile, slot.shape)
        else:
            array = rng.standard_normal(slot.shape, dtype=np.float32) * np.float32(0.02)
        slot.load(SourceTensor(name, array, slot.shape))

