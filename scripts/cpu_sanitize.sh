#!/usr/bin/env bash
# The tests of the compiled CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer.
# Needs GCC, and cmake, ninja and nanobind in the environment of PYTHON (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m cmake -S . -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_MAKE_PROGRAM="$(dirname "$(command -v "$python")")/ninja" -DPython_EXECUTABLE="$(command -v "$python")" \
  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" > /dev/null
"$python" -m cmake --build "$work/build" > /dev/null
cp -r src "$work/src"
cp "$work"/build/_native*.so "$work/src/selfindex/backends/cpu/"
# Python itself is not instrumented: the runtime has to be there first, and its leaks are not ours.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$work/src" OMP_NUM_THREADS=1 \
  "$python" -m pytest tests/cpu -n 0 -p no:cacheprovider
