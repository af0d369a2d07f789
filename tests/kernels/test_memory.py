"""Memory that is cleared before it is asked for."""

from __future__ import annotations

import mmap
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from pagoda.kernels.memory import allocate, touch


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split(".")[:2])


@pytest.mark.skipif(sys.platform != "linux" or kernel() < (5, 14), reason="before Linux 5.14 pages come when they are first written")
def test_the_first_page_of_each_array_is_there_before_it_is_written() -> None:
    arrays = [allocate(8 << 20) for _ in range(8)]
    small, before = np.zeros(10, np.uint8), resident()
    touch([small, *arrays]).join()
    grown = resident() - before
    assert 7 * (2 << 20) <= grown <= 10 * (2 << 20), "2 MiB of each, and of no array more"
    assert not any(array.any() for array in arrays)
