"""Memory that begins in small pages and goes on in huge ones."""

from __future__ import annotations

import mmap
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from pagoda.kernels.memory import allocate, begin_small


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split(".")[:2])


def has_huge_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.skipif(sys.platform != "linux" or kernel() < (6, 1) or not has_huge_pages(), reason="Linux before 6.1, or without huge pages, does not put pages together when asked")
def test_planes_begin_in_small_pages_and_go_on_in_huge_ones() -> None:
    planes, small = [allocate(8 << 20) for _ in range(8)], allocate(100)
    before = resident()
    thread = begin_small([small, *planes], seconds=0.5)
    assert thread is not None
    for number, plane in enumerate(planes):
        plane[[0, 5000, 5 << 20]] = number + 1  # the last lies beyond what begins in small pages
    assert resident() - before < 8 * (3 << 20), "of the first 2 MiB two pages, of the rest a huge one"
    thread.join()
    assert resident() - before >= 8 * (4 << 20) - (1 << 20)
    for number, plane in enumerate(planes):
        assert (plane[[0, 5000, 5 << 20]] == number + 1).all() and np.count_nonzero(plane) == 3
