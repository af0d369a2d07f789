"""Figures for people and for programs: an aligned table on stdout, and the same as JSON.

Every report names the machine, the versions and the options, so that a number never stands alone.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pagoda import __version__
from pagoda.base.hardware import read_hardware
from pagoda.kernels import table
from pagoda.kernels.cpu import library

__all__ = ["Report", "Row", "Spread", "machine", "machine_line"]


@dataclass(frozen=True)
class Row:
    """One line of the table: `key` is its name in JSON, `value` the figure in `unit`."""

    key: str
    label: str
    value: float | int | str
    unit: str = ""

    def line(self) -> str:
        return f"  {self.label:<38}{_shown(self.value):>14} {self.unit}".rstrip()


@dataclass(frozen=True)
class Report:
    """What a measurement found. `detail` goes to the JSON only; `notes` are lines under the table."""

    title: str
    rows: Sequence[Row]
    options: Mapping[str, Any]
    detail: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    is_ok: bool = True

    def lines(self) -> list[str]:
        rule = "-" * 62
        return [rule, self.title, machine_line(), rule, *(row.line() for row in self.rows), rule, *self.notes]

    def show(self) -> None:
        print("\n".join(self.lines()), flush=True)

    def data(self) -> dict[str, Any]:
        """One flat object: the rows by their keys, then the detail, the options and the machine."""
        options = {key: value for key, value in self.options.items() if value is not None}
        found = {row.key: row.value for row in self.rows}
        return {"benchmark": self.title, "date": _now(), **found, **self.detail, "options": options, "machine": machine()}

    def write(self, path: Path) -> None:
        """JSON without NaN or infinity, which not every reader takes."""
        path.write_text(json.dumps(_finite(self.data()), indent=2, default=str) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Spread:
    """Mean, median and percentiles of a sample. All zero when the sample is empty."""

    values: Sequence[float]

    def at(self, percent: float) -> float:
        return float(np.percentile(self.values, percent)) if len(self.values) else 0.0

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if len(self.values) else 0.0

    def rows(self, key: str, label: str, unit: str, percents: Sequence[float] = (90, 99)) -> list[Row]:
        """vLLM's names: mean_x, median_x, std_x, p99_x."""
        rows = [Row(f"mean_{key}", f"{label}, mean", self.mean, unit), Row(f"median_{key}", f"{label}, median", self.at(50), unit)]
        rows += [Row(f"p{percent:g}_{key}", f"{label}, p{percent:g}", self.at(percent), unit) for percent in percents]
        return rows


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    hardware = read_hardware()
    is_native = table.numpy_device() == "cpu"
    return {
        "cpu": hardware.cpu_model,
        "num_cores": hardware.num_cores,
        "memory_gib": round(hardware.memory_total / 2**30, 1),
        "kernels": library.default().isa if is_native else "reference",
        "pagoda": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.platform(),
    }


def machine_line() -> str:
    facts = machine()
    return (
        f"{facts['cpu']}, {facts['num_cores']} cores, {facts['memory_gib']} GiB; kernels {facts['kernels']}; "
        f"pagoda {facts['pagoda']}, Python {facts['python']}, numpy {facts['numpy']}"
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _shown(value: float | int | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) < 1:
        return f"{value:.3g}"
    return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.2f}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value
