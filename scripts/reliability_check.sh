#!/usr/bin/env bash
# docs/reliability.md on a machine with a GPU: streams, a soak, leaks, loading of prefixes, two GPUs.
#   scripts/reliability_check.sh [stream] [growth] [leaks] [soak] [prefix] [two]    (without arguments: all but two)
# Minutes on an H100, about: stream 4, growth 1, leaks 2, soak 4 (SOAK seconds), prefix 1, two (needs two GPUs) 2.
# OUT: folder of the results (default: reliability); copy them to benchmarks/results and run
# benchmarks/reliability.py. MODEL: model of the streams (default smollm2). PYTHON: interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-reliability} python=${PYTHON:-python3} failed=0
mkdir -p "$out"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(stream growth leaks soak prefix)

for part in "${parts[@]}"; do
  case $part in
    stream)  # 30,000 steps as a graph, ten turns, 128k in pieces of 2k
      "$python" benchmarks/stream.py --device cuda --model "${MODEL:-smollm2}" --graph --only graph chat prefill \
        --output "$out/stream-h100.json" || failed=1 ;;
    growth)  # 20,000 steps launched one by one
      "$python" benchmarks/stream.py --device cuda --only generate --tokens 20000 --every 4000 \
        --output "$out/stream-steps-h100.json" || failed=1 ;;
    leaks)
      "$python" scripts/leaks.py --device cuda --output "$out/leaks-h100.json" || failed=1 ;;
    soak)
      "$python" scripts/soak.py --device cuda --seconds "${SOAK:-240}" --output "$out/soak-h100.json" || failed=1 ;;
    prefix)
      "$python" benchmarks/prefix.py --device cuda --output "$out/prefix-h100.json" || failed=1 ;;
    two)
      scripts/tp_check.sh 2 || failed=1
      "$python" -m pytest -n 0 -m gpu tests/integration/test_engines.py || failed=1 ;;
    *)
      echo "unknown part '$part'; parts are stream, growth, leaks, soak, prefix, two" >&2; exit 2 ;;
  esac
done
exit $failed
