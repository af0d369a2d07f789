"""The Triton kernels run in Triton's interpreter here: no GPU is needed, and torch tensors on the CPU stand for a GPU's.
With TRITON_INTERPRET=0, on a machine that has a GPU, the same tests run the compiled kernels on it.

TRITON_INTERPRET is read when triton is first imported, so `tests/conftest.py` sets it before any test module is.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pagoda.kernels import table

torch = pytest.importorskip("torch", reason="torch is not installed: the Triton kernels work on its tensors")
triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Torch tensors on the CPU use the kernels of the device "cuda"; without the interpreter tensors are made on the GPU."""
    if not triton.knobs.runtime.interpret and not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0, and there is no GPU")
    with table.backend("cuda"), torch.device("cpu" if triton.knobs.runtime.interpret else "cuda"):
        yield
