#!/usr/bin/env bash
# Tasks and fidelity of one model on a GPU, a few minutes a call; a call goes on where the last one stopped.
#   scripts/quality_gpu.sh MODEL [LENGTHS] [TASKS] [SAMPLES] [PARTS]
#     MODEL    folder of a model, or qwen-coder-1.5b / qwen-coder-0.5b: see evals/models.py
#     LENGTHS  4096,16384   TASKS  ruler,code,answers (or names)   SAMPLES  a task: 50
#     PARTS    of "tasks fidelity layers heatmap batches": tasks
# OUT: folder of the results (quality_gpu). RESUME: its records.jsonl of an earlier call, copied there first.
# MINUTES: when to stop, without loading (7). METHODS: beginnings of names, with commas (those of the suite "long").
# POLICY: default,every. TEXTS: manual stdlib, or UTF-8 files. BUDGET: 5%. BATCH: prompts at a time (what fits).
# DEVICE: cuda. DTYPE: bfloat16. PYTHON: interpreter.
# To keep the results: cp OUT/results.json evals/results/eval-NAME.json, then python -m evals.quality.
set -uo pipefail
[ $# -ge 1 ] || { sed -n 2,12p "$0"; exit 2; }
model=$1 lengths=${2:-4096,16384} tasks=${3:-ruler,code,answers} samples=${4:-50} parts=${5:-tasks}
cd "$(dirname "$0")/.." || exit
out=${OUT:-quality_gpu} python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
if [ -n "${RESUME:-}" ] && [ -f "$RESUME" ] && [ ! -f "$out/records.jsonl" ]; then cp "$RESUME" "$out/records.jsonl"; fi
[[ $model == qwen-coder-* ]] && { model=$("$python" -m evals.models "$model") || exit; }

options=()
for part in $parts; do options+=(--part "$part"); done
for text in ${TEXTS:-manual stdlib}; do options+=(--text "$text"); done
[ -z "${METHODS:-}" ] || options+=(--methods "$METHODS")
start=$SECONDS
"$python" -m selfindex eval "$model" --suite long "${options[@]}" --tasks "$tasks" --lengths "$lengths" \
  --samples "$samples" --policy "${POLICY:-default,every}" --budget "${BUDGET:-5%}" --batch "${BATCH:-0}" \
  --minutes "${MINUTES:-7}" --device "${DEVICE:-cuda}" --dtype "${DTYPE:-bfloat16}" --output "$out" 2>&1 |
  tee "$out/log.txt"
code=$?
echo "$((SECONDS - start)) s, $(wc -l < "$out/records.jsonl") records"
exit $code
