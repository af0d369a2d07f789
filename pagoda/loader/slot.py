"""The places weights go: what a loader asks of a layer."""

from __future__ import annotations

from typing import Protocol

from pagoda.base.errors import ModelFileError
from pagoda.loader.tensor import SourceTensor

__all__ = ["Slot", "check_shape"]


class Slot(Protocol):
    """One tensor of a checkpoint. `load` may keep a view of the source until its layer is complete."""

    def load(self, source: SourceTensor) -> None: ...

    @property
    def is_loaded(self) -> bool: ...

    @property
    def is_packed(self) -> bool:
        """No view of the source is held any more: its pages may go."""

    @property
    def is_optional(self) -> bool: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_shape(source: SourceTensor, expected: tuple[int, ...]) -> None:
    """ModelFileError when a file's tensor is not of the shape the model's config asks for."""
    if tuple(source.shape) != expected:
        raise ModelFileError(
            f"has shape {tuple(source.shape)}, but the model's config asks for {expected}; the file and its config do not belong together",
            tensor=source.name,
        )
