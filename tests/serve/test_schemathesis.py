"""schemathesis, a client that knows nothing but our /openapi.json, looks for bodies that break the server. It lives in build/schemathesis."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.test_server_process import toy

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/schemathesis"
CHECKS = "not_a_server_error,response_schema_conformance,content_type_conformance,status_code_conformance"
NUM_CASES = 2000


def program() -> Path:
    """Installed where it is not yet; skips where no registry answers."""
    found = FOLDER / "bin/schemathesis"
    if not found.exists():
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        done = subprocess.run([str(FOLDER / "bin/pip"), "install", "--quiet", "schemathesis"], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"schemathesis cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    return found


@pytest.mark.long
def test_no_body_breaks_the_server(tmp_path: Path) -> None:
    command = [
        program(), "run", "--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "250", "--seed", "1",
        "--continue-on-failure", "--no-color", "--request-timeout", "60", "--generation-database", "none",
    ]  # fmt: skip
    with toy("") as server:
        done = subprocess.run([*command, server.url + "/openapi.json"], capture_output=True, text=True, cwd=tmp_path, timeout=1200)
    said = done.stdout + done.stderr
    found = re.search(r"(\d+) generated", said)
    assert done.returncode == 0, said[-5000:]
    assert found and int(found[1]) >= NUM_CASES, said[-1000:]
