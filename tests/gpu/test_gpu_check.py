"""`make gpu-check` writes its report whatever its parts do."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts/gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


FIGURES = {
    "shape": "x", "output_tokens_per_s": 9500.0, "step_ms": 4.0, "ttft_ms": {"p50": 1.0}, "itl_ms": {"p50": 2.0, "p99": 3.0},
    "achieved_bytes_per_s": 3e12, "host_us": 800.0, "start_s": 20.0, "step_over_bytes": 1.5,
}  # fmt: skip


def test_each_part_fails_alone(tmp_path: Path) -> None:
    check = load()
    check.SHORTEST = 1.0
    say = f"print('noise'); print({json.dumps(FIGURES)!r})"
    parts = [
        check.Part("fails", ["-c", "raise SystemExit('no GPU')"], 60),
        check.Part("hangs", ["-c", "import time; print('begun', flush=True); time.sleep(60)"], 2),
        check.Part("measures", ["-c", say], 60, ("tokens", "output_tokens_per_s", ">=", 9000)),
        check.Part("misses", ["-c", say], 60, ("ratio", "step_over_bytes", "<=", 1.35)),
        check.Part("late", ["-c", say], 60, ("tokens", "output_tokens_per_s", ">=", 9000)),
    ]
    for part in parts:
        check.run(part, 0.5 if part.name == "late" else 100.0, dict(os.environ))
        check.report(parts, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert [part.status for part in parts] == ["failed (exit 1)", "stopped after 2 s", "ok", "ok", "no time left"]
    assert "no GPU" in text and "begun" in text
    assert "tokens: 9,500.0 met" in text and "ratio: 1.5 MISSED" in text and "tokens: not measured" in text


def test_its_parts_name_what_is_there() -> None:
    """Scripts, tests and shapes of the commands exist, and the limits leave room within 25 minutes for those with a bar."""
    check = load()
    from pagoda.bench.shapes import SHAPES

    for part in check.parts():
        for word in part.command:
            if word.endswith(".py") and not word.startswith("-"):
                assert (ROOT / word).is_file(), word
            if word.startswith("tests/"):
                assert (ROOT / word).exists(), word
        if "--shape" in part.command:
            assert part.command[part.command.index("--shape") + 1] in SHAPES
    assert check.BUDGET <= 25 * 60
    with_bar = [i for i, part in enumerate(check.parts()) if part.bar is not None]
    assert len(with_bar) == 3 and sum(part.seconds for part in check.parts()[: with_bar[1]]) < check.BUDGET, "bars come first"
