#!/usr/bin/env bash
# The quality measurements that are too slow for a CPU; run it again to go on after an interruption.
#   scripts/gpu_evals.sh MODEL OUT TEXT...     TEXT: UTF-8 files (manual.txt kjv.txt ...), or manual, stdlib
# PARTS: what to run, of "tasks heatmap fidelity layers batches ablation stream chat profile" (all). DEVICE: cuda. PYTHON: interpreter.
# To keep the results: cp OUT/eval/results.json evals/results/eval-NAME.json, the other JSON files of OUT as
# evals/results/PART-NAME.json, then python -m evals.quality.
set -uo pipefail
[ $# -ge 3 ] || { sed -n 2,6p "$0"; exit 2; }
model=$1 out=$2
shift 2
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3} device=${DEVICE:-cuda} failed=0
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
names=("$@") texts=()
for text in "$@"; do texts+=(--text "$text"); done
mkdir -p "$out"

evaluate() {
  "$python" -m selfindex eval "$model" --suite full --device "$device" --output "$out/eval" "${texts[@]}" "$@" ||
    failed=1
}

for part in ${PARTS:-tasks heatmap fidelity layers batches ablation stream chat profile}; do
  start=$SECONDS
  case $part in
    tasks | heatmap | fidelity | batches) evaluate --part "$part" ;;
    layers)
      evaluate --part layers --method "selfindex balanced 5" --method "selfindex paper" --method oracle \
        --method Quest --method DoubleSparse --method SnapKV --method StreamingLLM --method KIVI-2 ;;
    ablation)
      "$python" -m evals.ablation model --model "$model" --texts "$(IFS=,; echo "${names[*]}")" --take 1 --parts 2 \
        --designs open --budgets 0.05,0.075,0.1 --threads 8 --device "$device" --tag=-open --out "$out" || failed=1 ;;
    stream)
      "$python" -m evals.stream --model "$model" --texts "${names[@]:0:2}" --device "$device" \
        --output "$out/stream.json" || failed=1
      "$python" -m evals.stream --model "$model" --texts "${names[0]}" --device "$device" --generated \
        --output "$out/stream-generated.json" || failed=1 ;;
    chat)
      "$python" -m evals.chat --model "$model" --texts "${names[@]}" --device "$device" --output "$out/chat.json" ||
        failed=1 ;;
    profile)
      # A profile of the first text, which has to be a file, used on the others.
      "$python" -m selfindex profile "$model" --file "${names[0]}" -o "$out/profile.safetensors" --device "$device" &&
        "$python" -m evals.fidelity --model "$model" --texts "${names[@]:1}" --lengths 4096 --device "$device" --only \
          --variant "first page:budget=0.05" --output "$out/fidelity-profile.json" \
          --variant "profile of another text:budget=0.05,profile=\"$out/profile.safetensors\"" || failed=1 ;;
    *) echo "unknown part '$part'" >&2; exit 2 ;;
  esac
  echo "$part: $((SECONDS - start)) s"
done
exit $failed
