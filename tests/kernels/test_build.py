"""How the native library is built: which instruction sets, and that those which are left out here still compile."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pagoda.csrc import build


@pytest.mark.parametrize(
    ("flags", "levels"),
    [("sse2 ssse3", 0), ("avx2 fma f16c", 1), ("avx2 fma f16c avx512f avx512bw avx512vl", 1), ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", 2),
     ("f16c fma avx512_vnni avx512dq avx512vl avx512bw avx512f avx2", 3), ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16 amx", 4)],
)
def test_levels_follow_the_processor(tmp_path: Path, flags: str, levels: int) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: avx512_bf16\n")
    assert build.levels_here(cpuinfo) == levels


def test_a_system_that_does_not_say_gets_all_levels(tmp_path: Path) -> None:
    assert build.levels_here(tmp_path / "none") == len(build.X86)
    (tmp_path / "arm").write_text("Features\t: asimd\n")
    assert build.levels_here(tmp_path / "arm") == len(build.X86)


def test_levels_that_are_left_out_compile() -> None:
    """Who works on a machine without AVX-512 hears of it there."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = build.sources(build.levels_here())
    for path, flags in build.sources().items():
        if path not in built:
            command = [*compiler.split(), *build.FLAGS, *build.WARNINGS, *flags, f"-I{build.HERE}", "-fsyntax-only", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0 and not done.stderr, done.stderr
