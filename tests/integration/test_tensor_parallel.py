"""Tensor parallelism through transformers: processes hold their heads and agree with one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_model

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    make_model("llama", max_position_embeddings=2048).save_pretrained(tmp_path)
    path = os.pathsep.join([*sys.path, str(TESTS)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(TESTS / "tensor_parallel.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout
