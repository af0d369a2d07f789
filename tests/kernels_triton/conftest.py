"""The Triton kernels run in Triton's interpreter here: no GPU is needed, and torch tensors on the CPU stand for a GPU's.

TRITON_INTERPRET is read when triton is first imported, so `tests/conftest.py` sets it before any test module is.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pagoda.kernels import table

torch = pytest.importorskip("torch", reason="torch is not installed: the Triton kernels work on its tensors")
triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Torch tensors on the CPU use the kernels of the device "cuda"."""
    assert triton.knobs.runtime.interpret, "triton was imported before TRITON_INTERPRET was set"
    with table.backend("cuda"):
        yield
