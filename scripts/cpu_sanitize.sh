#!/usr/bin/env bash
# The tests of the compiled CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer.
# Needs GCC, and the package's `dev` extra in the environment of PYTHON (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r src "$work/src"
rm -f "$work"/src/selfindex/backends/cpu/_native*
scripts/cpu_build.sh "$work/build" -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined \
  -fno-omit-frame-pointer
mv "$work/build/_native.so" "$work/src/selfindex/backends/cpu/"
# An editable installation would bring its own module: its import hook goes.
echo 'import sys; sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]' \
  > "$work/src/sitecustomize.py"
# Python itself is not instrumented: the runtime has to be there first, and its leaks are not ours.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" OMP_NUM_THREADS=1 \
  ASAN_OPTIONS=detect_leaks=0:malloc_context_size=4:quarantine_size_mb=32 PYTHONPATH="$work/src"
"$PYTHON" -c 'from selfindex.backends.cpu.loader import native; print(native().__file__)' | grep -F "$work"
"$PYTHON" -m pytest tests/cpu --ignore tests/cpu/test_model.py -n 0 -p no:cacheprovider "$@"
