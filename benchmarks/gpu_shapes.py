"""Writes a folder with the config.json of a shape that people run: `python benchmarks/gpu_shapes.py llama-3.1-8b FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from pagoda.bench.shapes import SHAPES, write_shape  # noqa: E402

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: gpu_shapes.py {{{','.join(SHAPES)}}} FOLDER")
    print(write_shape(sys.argv[1], Path(sys.argv[2])))
