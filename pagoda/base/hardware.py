"""What this machine gives to this process: cores by affinity and cgroup quota, memory by cgroup limit. Pure reading."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import msgspec

__all__ = ["GpuFacts", "HardwareFacts", "read_hardware"]


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Read by `worker/device.py`, the one that may ask a GPU's driver."""

    name: str
    capability: int  # 90 is compute capability 9.0
    memory_total: int
    memory_free: int


class HardwareFacts(msgspec.Struct, frozen=True, kw_only=True):
    machine: str  # "x86_64", "aarch64", ...
    cpu_model: str
    cpu_ids: tuple[int, ...]  # logical cores this process may run on
    num_cores: int  # cores' worth of time it may use: affinity, capped by the cgroup's quota
    memory_total: int  # bytes this process may ever use: RAM, capped by the cgroup's limit
    memory_available: int  # bytes it may use now
    has_cuda: bool = False  # a driver is there; whether it works is not known yet
    gpu: GpuFacts | None = None
    gpu_problem: str = ""  # in one line, why there is none that can be used


def read_hardware() -> HardwareFacts:
    cpu_ids = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else tuple(range(os.cpu_count() or 1))
    quota = _cgroup_cpu_quota()
    num_cores = max(1, min(len(cpu_ids), math.ceil(quota) if quota else len(cpu_ids)))
    total, available = _memory()
    return HardwareFacts(
        machine=platform.machine(),
        cpu_model=_cpu_model(),
        cpu_ids=cpu_ids,
        num_cores=num_cores,
        memory_total=total,
        memory_available=available,
        has_cuda=Path("/dev/nvidiactl").exists(),
    )


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cgroup_folders() -> list[Path]:
    """The cgroup v2 folders from this process's own up to the root, or nothing."""
    root = Path("/sys/fs/cgroup")
    try:
        own = next(line.split("::", 1)[1] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    folder = root / own.strip().lstrip("/")
    return [f for f in [folder, *folder.parents] if f == root or root in f.parents]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cgroup_cpu_quota() -> float | None:
    """Cores' worth of time, or None when unlimited."""
    limits = []
    for folder in _cgroup_folders():
        parts = _read(folder / "cpu.max").split()
        if len(parts) == 2 and parts[0] != "max":
            limits.append(int(parts[0]) / int(parts[1]))
    v1 = Path("/sys/fs/cgroup/cpu")
    quota, period = _read(v1 / "cpu.cfs_quota_us"), _read(v1 / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit():
        limits.append(int(quota) / int(period))
    return min(limits) if limits else None


def _memory() -> tuple[int, int]:
    total = available = 0
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
        elif line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    if not total:  # not Linux
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = total // 2
    for folder in _cgroup_folders():
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if limit.isdigit():
            reclaimable = _stat_value(folder / "memory.stat", "inactive_file")
            total = min(total, int(limit))
            available = min(available, int(limit) - int(used or 0) + reclaimable)
    v1 = Path("/sys/fs/cgroup/memory")
    limit, used = _read(v1 / "memory.limit_in_bytes"), _read(v1 / "memory.usage_in_bytes")
    if limit.isdigit() and int(limit) < total:
        total, available = int(limit), min(available, int(limit) - int(used or 0))
    return total, max(0, available)


def _stat_value(path: Path, key: str) -> int:
    for line in _read(path).splitlines():
        if line.startswith(key + " "):
            return int(line.split()[1])
    return 0
