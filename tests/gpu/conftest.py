"""The GPU's path. Without a GPU on the null device: torch tensors in host memory, Triton's interpreter, no stream."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the GPU's path computes with it")
pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("transformers", reason="transformers makes the tiny models")
