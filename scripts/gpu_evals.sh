#!/usr/bin/env bash
# The quality measurements that are too slow for a CPU; run it again to go on after an interruption.
#   scripts/gpu_evals.sh MODEL OUT TEXT...     TEXT: UTF-8 files (manual.txt kjv.txt ...), or manual, stdlib
# PARTS: what to run, of "tasks heatmap fidelity layers" (all). DEVICE: cuda. PYTHON: interpreter.
# To keep a result: cp OUT/eval/results.json evals/results/eval-NAME.json && python -m evals.quality
set -uo pipefail
[ $# -ge 3 ] || { sed -n 2,5p "$0"; exit 2; }
model=$1 out=$2
shift 2
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3} device=${DEVICE:-cuda} failed=0
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
texts=()
for text in "$@"; do texts+=(--text "$text"); done

evaluate() {
  "$python" -m selfindex eval "$model" --suite full --device "$device" --output "$out/eval" "${texts[@]}" "$@" ||
    failed=1
}

for part in ${PARTS:-tasks heatmap fidelity layers}; do
  start=$SECONDS
  case $part in
    tasks | heatmap | fidelity) evaluate --part "$part" ;;
    layers)
      evaluate --part layers --method "selfindex balanced 5" --method "selfindex paper" --method oracle \
        --method Quest --method DoubleSparse --method SnapKV --method StreamingLLM --method KIVI-2 ;;
    *) echo "unknown part '$part'" >&2; exit 2 ;;
  esac
  echo "$part: $((SECONDS - start)) s"
done
exit $failed
