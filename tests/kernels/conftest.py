"""Fixtures of the kernel tests: every instruction set this machine runs, and a known state of the library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pagoda.kernels.cpu import library


def native() -> library.Library | None:
    try:
        return library.default()
    except library.LibraryUnavailable:
        return None


def isas() -> list[str]:
    lib = native()
    return lib.isas if lib else []


@pytest.fixture(params=isas() or [pytest.param("none", marks=pytest.mark.skip(reason="the native library is not built"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, with two threads."""
    lib = library.default()
    before, threads = lib.isa, lib.num_threads
    lib.set_isa(request.param)
    lib.set_threads(2)
    yield request.param
    lib.set_isa(before)
    lib.set_threads(threads)
