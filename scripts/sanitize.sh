#!/bin/sh
# Builds the native library with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of the tree, and runs the kernels' tests
# on it. Anything either of them finds ends the run.
# usage: sanitize.sh PYTHON [pytest arguments]
set -eu
python=$(realpath -s "$1")
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r pagoda tests pyproject.toml "$folder"
rm -rf "$folder/pagoda/csrc/build" "$folder"/pagoda/kernels/cpu/*.so
# only the instruction sets that this machine runs: compiling the others takes longer than all of the tests
PAGODA_BUILD_LEVELS=${PAGODA_BUILD_LEVELS:-$("$python" -c "from pagoda.kernels.cpu import library; print(len(library.default().isas) - 1)")}
export PAGODA_BUILD_LEVELS
cd "$folder"
compiler=${CXX:-g++}
# -O1: with -O3 and both sanitizers GCC 12 takes more than a quarter of an hour for one instruction set
CXXFLAGS="-O1" CXX="$compiler -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g" "$python" pagoda/csrc/build.py
runtime=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so):$("$compiler" -print-file-name=libstdc++.so.6)
PYTHONPATH=$folder LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" -m pytest -q -p no:cacheprovider --timeout 1200 "${@:-tests/kernels}" \
    --deselect tests/kernels/test_library.py::test_the_best_instruction_set_is_chosen_and_can_be_overridden \
    --deselect tests/kernels/test_library.py::test_instruction_sets_share_no_code  # they look at the plain library and its processes
