"""Builds the native library: one object per instruction set, linked into one shared library, with any C++20 compiler.

    python pagoda/csrc/build.py            builds pagoda/kernels/cpu/libpagoda.so for this machine when sources or flags changed
    python pagoda/csrc/build.py --all      for every machine of its architecture, as wheels are
    python pagoda/csrc/build.py --force    in any case

A library for this machine leaves out the instruction sets that its processor lacks, each minutes of compiling; one that does so runs everywhere,
and slower where they would have been chosen. PAGODA_BUILD_LEVELS=1 builds only the first of x86's instruction sets, 2 the first two. CXX names
the compiler, CXXFLAGS what it is told besides.

Uses only the standard library, because the wheel's build hook runs it before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["LIBRARY", "BuildError", "build", "build_roofline", "find_compiler", "levels_here"]

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "kernels" / "cpu"
LIBRARY = TARGET / "libpagoda.so"

FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # the last: a fault of GCC 12's own headers
_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mprfchw"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86 = {  # from the least to the most, as api.cpp counts them
    "isa_avx2.cpp": _AVX2,
    "isa_avx512.cpp": _AVX512,
    "isa_avx512_vnni.cpp": [*_AVX512, "-mavx512vnni"],
    "isa_avx512_bf16.cpp": [*_AVX512, "-mavx512vnni", "-mavx512bf16"],
}


_NEEDED = [{"avx2", "fma", "f16c"}, {"avx512f", "avx512bw", "avx512vl", "avx512dq"}, {"avx512_vnni"}, {"avx512_bf16"}]  # as Linux calls them


class BuildError(RuntimeError):
    """The compiler failed; the message holds the command and what the compiler said."""


def find_compiler() -> str | None:
    """$CXX, else the first of c++, g++, clang++ on the path."""
    if chosen := os.environ.get("CXX"):
        if shutil.which(chosen.split()[0]) is None:
            raise BuildError(f"CXX is `{chosen}`, which is not there: unset it, or name a C++ compiler")
        return chosen
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _own_flags() -> list[str]:
    """$CXXFLAGS, which come last and so win."""
    return os.environ.get("CXXFLAGS", "").split()


def levels_here(cpuinfo: Path = Path("/proc/cpuinfo")) -> int:
    """How many of X86 this processor has; all of them where the system does not say."""
    try:
        found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is None:
        return len(X86)
    flags = set(found[1].split())
    return next((level for level, needed in enumerate(_NEEDED) if not needed <= flags), len(X86))


def sources(levels: int = len(X86)) -> dict[Path, list[str]]:
    """Each translation unit of this machine's architecture with its own flags."""
    units = {HERE / name: [] for name in ("api.cpp", "lane.cpp", "program.cpp", "threads.cpp", "isa/isa_portable.cpp")}
    if platform.machine().lower() in ("x86_64", "amd64"):
        chosen = list(X86.items())[: int(os.environ.get("PAGODA_BUILD_LEVELS", levels))]
        units |= {HERE / "isa" / name: flags for name, flags in chosen}
        units[HERE / "api.cpp"] = [f"-DPG_NUM_LEVELS={len(chosen)}"]
    return units


def _fingerprint(compiler: str, units: dict[Path, list[str]]) -> str:
    digest = hashlib.sha256(" ".join([compiler, platform.machine(), *FLAGS, *_own_flags(), *WARNINGS, repr(units)]).encode())
    digest.update(subprocess.run([*compiler.split(), "--version"], capture_output=True, check=False).stdout)
    for path in sorted([*HERE.rglob("*.h"), *HERE.rglob("*.cpp")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        sys.stderr.write(done.stderr)


def build(*, levels: int = len(X86), force: bool = False) -> Path:
    """Builds the library with the first `levels` of X86 unless it is up to date, and returns its path. BuildError without or from the compiler."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler: set CXX, or install g++ or clang++")
    stamp = HERE / "build" / "stamp"
    chosen = sources(levels)
    fingerprint = _fingerprint(compiler, chosen)
    if not force and LIBRARY.exists() and stamp.exists() and stamp.read_text() == fingerprint:
        return LIBRARY
    objects = HERE / "build"
    objects.mkdir(exist_ok=True)
    command = [*compiler.split(), *FLAGS, *_own_flags(), *WARNINGS, f"-I{HERE}"]
    units = [(path, flags, objects / f"{path.stem}.o") for path, flags in chosen.items()]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda unit: _run([*command, *unit[1], "-c", str(unit[0]), "-o", str(unit[2])]), reversed(units)))
    static = [] if sys.platform == "darwin" else ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
    fresh = LIBRARY.with_suffix(f".{os.getpid()}.tmp")
    _run([*compiler.split(), "-shared", *static, *(str(o) for *_, o in units), "-o", str(fresh), "-pthread"])
    fresh.replace(LIBRARY)  # atomic: a process that has the old one mapped keeps it
    stamp.write_text(fingerprint)
    return LIBRARY


def build_roofline() -> Path:
    """Builds the program that measures this machine's limits, for this machine only, and returns its path."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler: set CXX, or install g++ or clang++")
    program = HERE / "build" / "roofline"
    source = HERE / "bench" / "roofline.cpp"
    program.parent.mkdir(exist_ok=True)
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        _run([*compiler.split(), "-std=c++20", "-O3", "-march=native", str(source), "-o", str(program), "-pthread"])
    return program


if __name__ == "__main__":
    try:
        print(build(levels=len(X86) if "--all" in sys.argv else levels_here(), force="--force" in sys.argv))
    except BuildError as error:
        sys.exit(str(error))
