"""Fixtures that every room's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of third-party test data beside the repository; tests that need it skip where it is absent."""
    if not _SHARED.is_dir():
        pytest.skip("../shared/data is absent: third-party test data is not part of the repository")
    return _SHARED
