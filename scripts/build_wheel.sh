#!/bin/sh
# Builds the wheel and tests it in an environment of its own in which no compiler can be found.
# usage: build_wheel.sh PYTHON
set -eu
python=$1
rm -rf dist
"$python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
wheel=$(ls dist/*.whl)
echo "built $wheel"
case "$wheel" in *py3-none-any.whl) echo "the wheel has no native library: is there a C++ compiler?" >&2; exit 1 ;; esac

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$wheel"
cd "$folder"
CXX=/nonexistent PATH="$folder/venv/bin" "$folder/venv/bin/python" - <<'PY'
from pagoda.kernels import table
assert table.numpy_device() == "cpu", "the native library of the wheel did not load"
print("the wheel's native library loads without a compiler")
PY
PATH="$folder/venv/bin" "$folder/venv/bin/pagoda" complete --max-tokens 8 --temperature 0 "The capital of France is"
