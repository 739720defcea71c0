#!/usr/bin/env bash
# What CI cannot run: GPU tests, compute-sanitizer and the benchmark, on a machine with a GPU.
#   scripts/gpu_check.sh [tests] [sanitizer] [benchmark]     (all three without arguments)
# OUT: folder of the benchmark's results and the logs (default: gpu_check). PYTHON: interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu_check} python=${PYTHON:-python3} failed=0
mkdir -p "$out"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests sanitizer benchmark)

for part in "${parts[@]}"; do
  case $part in
    tests)
      # The kernels, and what runs on every implementation of the operators.
      "$python" -m pytest tests/gpu tests/store/test_layer_machine.py tests/cli/test_doctor.py \
        tests/integration/test_{cache_machine,faults,fork,generate}.py -m gpu -n 4 2>&1 | tee "$out/tests.log" || failed=1 ;;
    sanitizer)
      # Only our own kernels are checked, except by initcheck, which has to see who wrote what they read.
      ours=()
      for name in decode fetch attend merge encode dense window select_test code_sums restore join; do ours+=(--kernel-name "kns=$name"); done
      for tool in memcheck racecheck synccheck initcheck; do
        [ $tool != initcheck ] || ours=()
        compute-sanitizer --tool "$tool" --error-exitcode 9 --report-api-errors no --check-api-memory-access no \
          "${ours[@]}" "$python" tests/gpu/sanitize.py > "$out/$tool.log" 2>&1
        status=$?
        echo "$tool: exit $status: $(tail -n 1 "$out/$tool.log")"
        [ $status -eq 0 ] || failed=1
      done ;;
    benchmark)
      for name in decode_attention encode end_to_end generate; do
        "$python" "benchmarks/$name.py" --output "$out/$name.json" || failed=1
      done
      for name in decode_attention encode end_to_end; do
        "$python" "benchmarks/$name.py" --preset paper --output "$out/$name-paper.json" || failed=1
      done
      "$python" benchmarks/paper.py --output "$out/paper.json" || failed=1
      "$python" benchmarks/chunk.py --device cuda --output "$out/chunk.json" || failed=1
      "$python" benchmarks/chunk_prefix.py --output "$out/chunk_prefix.json" || failed=1
      "$python" benchmarks/sparse_chunk.py --output "$out/sparse_chunk.json" || failed=1
      "$python" benchmarks/end_to_end.py --lengths 8192 131072 --layers 8 --compile 8192 131072 --skip-largest \
        --output "$out/end_to_end-compiled.json" || failed=1 ;;
    *)
      echo "unknown part '$part'; parts are tests, sanitizer, benchmark" >&2; exit 2 ;;
  esac
done
exit $failed
