"""The library itself: what is in it, how it is chosen, that its threads behave."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pagoda.kernels import ops
from pagoda.kernels.cpu import library

from .cases import normal, weight

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lib() -> library.Library:
    return library.default()


def python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=60, check=False)
    return done.stdout + done.stderr


def test_every_op_has_a_native_kernel(lib: library.Library) -> None:
    assert set(ops.__all__) - {"empty_like_rows"} | {"mark"} == set(lib.ops)


def test_the_best_instruction_set_is_chosen_and_can_be_overridden(lib: library.Library) -> None:
    code = "from pagoda.kernels.cpu.library import default; print(default().isa)"
    cpu = Path("/proc/cpuinfo")
    is_intel = cpu.is_file() and "GenuineIntel" in cpu.read_text()  # whose bfloat16 products are slower than floats
    assert python(code).strip() == ("avx512_vnni" if is_intel and lib.isas[-1] == "avx512_bf16" else lib.isas[-1])
    assert python(code, PAGODA_ISA="portable").strip() == "portable"
    assert "must be one of" in python(code, PAGODA_ISA="mmx")
    with pytest.raises(library.LibraryUnavailable, match="unknown instruction set `mmx`"):
        lib.set_isa("mmx")


def test_without_the_library_the_references_answer_and_say_so_once(tmp_path: Path) -> None:
    code = (
        "import logging, numpy as np, pathlib\n"
        "from pagoda.kernels.cpu import library\n"
        f"library.PATH = pathlib.Path({str(tmp_path)!r}) / 'libpagoda.so'\n"
        "logging.basicConfig()\n"
        "from pagoda.kernels import ops, table\n"
        "x = np.ones((2, 4), np.float32)\n"
        "print(ops.add(x, x).sum(), ops.add(x, x).sum(), table.numpy_device())\n"
    )
    out = python(code)
    assert "16.0 16.0 reference" in out
    assert out.count("running on the numpy references") == 1
    assert "was not built" in python(code, PAGODA_KERNELS="native")


def test_torch_is_never_imported() -> None:
    code = "import sys; from pagoda.kernels import ops, record; print([m for m in sys.modules if m.split('.')[0] == 'torch'])"
    assert python(code).strip() == "[]"


def test_two_callers_wait_for_each_other(lib: library.Library) -> None:
    rng = np.random.default_rng(0)
    w, x = weight(rng, "bf16", 64, 128), normal(rng, 9, 128)
    expected, wrong = ops.linear(x, w), []

    def call() -> None:
        for _ in range(200):
            if not np.array_equal(ops.linear(x, w), expected):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert not wrong


def test_more_threads_than_cpus_still_meet(lib: library.Library) -> None:
    rng = np.random.default_rng(0)
    w, x = weight(rng, "q8_0", 640, 64), normal(rng, 40, 64)
    before = lib.num_threads
    expected = ops.linear(x, w)
    try:
        lib.set_threads(8, [0] * 8)  # all on one cpu: they have to sleep to get anywhere
        for _ in range(20):
            np.testing.assert_array_equal(ops.linear(x, w), expected)
    finally:
        lib.set_threads(before)


def test_operands_no_kernel_can_read_are_refused(lib: library.Library) -> None:
    x = np.zeros((4, 8), np.float32)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        ops.scale(x[:, ::2], 2.0)
    with pytest.raises(ValueError, match="no kernel reads arrays of type float64"):
        ops.scale(x.astype(np.float64), 2.0)
    with pytest.raises(ValueError, match="as wide as the weight"):
        ops.linear(x, weight(np.random.default_rng(0), "f32", 16, 9))
    with pytest.raises(ValueError, match="`swish`"):
        ops.act_and_mul(x, "swish")


def test_instruction_sets_share_no_code() -> None:
    """An inline function built for two instruction sets would be merged by the linker, and crash the lesser CPU."""
    objects = sorted((ROOT / "pagoda" / "csrc" / "build").glob("isa_*.o"))
    nm = shutil.which("nm")
    if not objects or nm is None:
        pytest.skip("no object files of a build, or no nm")
    for path in objects:
        own = f"pg::{path.stem.removeprefix('isa_')}::"
        symbols = subprocess.run([nm, "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        shared = [line for line in symbols.splitlines() if line[17:18] in "WVuTDB" and own not in line and "pg::kIsa" not in line]
        assert not shared, (path.name, shared)
