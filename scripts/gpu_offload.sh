#!/usr/bin/env bash
# Offloading on a machine with a GPU: its tests, then the benchmark (17 GB of pinned host memory).
#   scripts/gpu_offload.sh [tests] [benchmark]     (both without arguments)
# OUT: folder of the results and the log (default: gpu_check). PYTHON: interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu_check} python=${PYTHON:-python3} failed=0
mkdir -p "$out"
export PYTHONPATH="$PWD/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests benchmark)

for part in "${parts[@]}"; do
  case $part in
    tests) "$python" -m pytest tests/gpu/test_offload.py -m gpu -n 4 2>&1 | tee "$out/offload_tests.log" || failed=1 ;;
    benchmark) "$python" benchmarks/offload.py --output "$out/offload.json" || failed=1 ;;
    *) echo "unknown part '$part'; parts are tests, benchmark" >&2; exit 2 ;;
  esac
done
exit $failed
