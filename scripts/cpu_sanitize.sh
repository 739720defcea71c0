#!/usr/bin/env bash
# The tests of the compiled CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer.
# Needs GCC, and the package's `dev` extra in the environment of PYTHON (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
scripts/cpu_build.sh "$work" -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined \
  -fno-omit-frame-pointer
# Python itself is not instrumented: the runtime has to be there first, and its leaks are not ours.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" OMP_NUM_THREADS=1 \
  ASAN_OPTIONS=detect_leaks=0:malloc_context_size=4:quarantine_size_mb=32 PYTHONPATH="$work/src"
"$PYTHON" -c 'from selfindex.backends.cpu.loader import native; print(native().__file__)' | grep -F "$work"
"$PYTHON" -m pytest tests/cpu --ignore tests/cpu/test_model.py -p no:cacheprovider "$@"
