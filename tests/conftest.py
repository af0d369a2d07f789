"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by whichever test comes first

import pytest

from pagoda.base.errors import ModelNotFound
from pagoda.files.hub import DEFAULT_MODEL, fetch_pinned
from pagoda.text.tokenizer import Tokenizer, load_tokenizer

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of third-party test data beside the repository; tests that need it skip where it is absent."""
    if not _SHARED.is_dir():
        pytest.skip("../shared/data is absent: third-party test data is not part of the repository")
    return _SHARED


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF file, fetched into the cache on the first run."""
    try:
        return fetch_pinned(DEFAULT_MODEL)
    except ModelNotFound as error:
        pytest.skip(f"the default model cannot be fetched: {error}")


@pytest.fixture(scope="session")
def default_tokenizer(default_model: Path) -> Tokenizer:
    return load_tokenizer(default_model)
