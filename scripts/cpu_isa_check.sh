#!/usr/bin/env bash
# Builds the compiled CPU operators and runs their tests with every instruction set of this processor
# forced in turn, then times each set once. For machines that CI does not have (AVX-512, ARM).
# Needs a C++17 compiler, Python's headers, and in the environment of PYTHON (default: python3) torch,
# transformers, pytest, pytest-xdist and hypothesis. nanobind may lie in any folder on PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
scripts/cpu_build.sh "$work" -O3
export PYTHONPATH="$work/src${PYTHONPATH:+:$PYTHONPATH}"
sets=$("$PYTHON" -c 'from selfindex.backends.cpu.loader import native; print(*native().instruction_sets())')
echo "instruction sets of this processor: $sets"
for set in $sets; do
  echo "== $set"
  OMP_NUM_THREADS=1 "$PYTHON" -m pytest tests/cpu -n 4 -p no:cacheprovider -k "$set or not (avx512 or avx2 or generic or neon)"
done
for set in $sets; do
  echo "== $set, times"
  SELFINDEX_CPU=$set "$PYTHON" benchmarks/cpu_decode.py --lengths 16384 --seconds 0.3
done
