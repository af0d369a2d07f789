"""Reports: aligned for people, parseable for programs, and never a number without its machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagoda.bench.report import Report, Row, Spread, machine_line


def _report() -> Report:
    rows = [Row("count", "Things", 12345), Row("rate", "Rate", 1234.5, "tok/s"), Row("small", "Small", 0.000123), Row("kind", "Kind", "a+b")]
    return Report("Title", rows, {"rate": float("inf"), "unset": None}, {"list": [1.0, float("nan")]}, ["a note"])


def test_the_table() -> None:
    lines = _report().lines()
    assert "Title" in lines and machine_line() in lines and lines[-1] == "a note"
    found = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert found["Things"].endswith("12,345") and found["Rate"].endswith("1,234.50 tok/s")
    assert found["Small"].endswith("0.000123") and found["Kind"].endswith("a+b")
    assert len({line.index(value) + len(value) for line, value in zip(found.values(), ("12,345", "1,234.50", "0.000123", "a+b"))}) == 1


def test_the_json(tmp_path: Path) -> None:
    _report().write(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (data["count"], data["rate"], data["kind"]) == (12345, 1234.5, "a+b")
    assert data["options"] == {"rate": "inf"} and data["list"] == [1.0, "nan"]
    assert {"cpu", "num_cores", "kernels", "pagoda", "python"} <= data["machine"].keys()


def test_spread() -> None:
    spread = Spread([1.0, 2.0, 3.0, 10.0])
    assert spread.mean == 4.0 and spread.at(50) == 2.5 and spread.at(100) == 10.0
    rows = {row.key: row.value for row in spread.rows("x_ms", "X", "ms", [100])}
    assert rows == {"mean_x_ms": 4.0, "median_x_ms": 2.5, "p100_x_ms": 10.0}
