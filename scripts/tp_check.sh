#!/usr/bin/env bash
# Tensor parallelism on the GPUs of this machine: results equal to one GPU.
#   scripts/tp_check.sh [PROCESSES]     (default: as many as there are GPUs; 2 without any, on the CPU)
# PYTHON: interpreter. Takes about a minute.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
count=${1:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# Heads for any number of processes up to 8.
"$python" -c "
from tiny_models import make_model
make_model('llama', num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=2048).save_pretrained('$folder')"
timeout 300 "$python" -m torch.distributed.run --standalone --nproc-per-node "$count" tests/tensor_parallel.py "$folder"
