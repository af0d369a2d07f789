"""Every Triton kernel compiles for GPUs that are not there, fits their shared memory and spills no register.

`aot.py` does the compiling in a process of its own, because kernels are interpreted in this one.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pagoda.kernels import triton as kernels_of_ops

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@functools.cache
def compiled(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.kernels_triton.aot", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(records: list[dict[str, Any]]) -> None:
    wrong = []
    for record in records:
        where = f"{record['kernel']} of {record['model']} for {record['target']}, {record['meta']}"
        if "error" in record:
            wrong.append(f"{where}: {record['error']}")
        elif record["shared"] > SHARED_LIMITS[record["target"]]:
            wrong.append(f"{where}: {record['shared']} bytes of shared memory")
        elif record["spilled"]:
            wrong.append(f"{where}: {record['spilled']} spilled with {record['registers']} registers")
    assert not wrong, "\n".join(wrong)


QUICK = ("--models", "qwen3-0.6b", "--targets", "sm_90,gfx942")


def test_one_model_compiles_for_two_targets() -> None:
    check(compiled(*QUICK))


def test_every_kernel_is_compiled() -> None:
    sources = [ROOT / "pagoda" / "kernels" / "triton" / f"{name}.py" for name in kernels_of_ops.__all__]
    kernels = {name for path in sources for name in re.findall(r"^def _(\w+)_kernel\(", path.read_text(), re.MULTILINE)}
    assert kernels and {record["kernel"] for record in compiled(*QUICK)} == kernels


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_all_models_compile(target: str) -> None:
    check(compiled("--targets", target))
