#!/bin/sh
# Runs the Triton kernels' tests with the newest Triton, in an environment of its own beside PYTHON's packages.
# usage: triton_newest.sh PYTHON
set -eu
python=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target "$folder" triton
PYTHONPATH="$folder" "$python" -c 'import triton; print("triton", triton.__version__)'
PYTHONPATH="$folder" "$python" -m pytest -p no:cacheprovider tests/kernels_triton
