"""Heads over ranks in processes of their own; one such process is tested as a server, in test_server.py."""

import json
import os
import subprocess
import sys

import pytest
import torch
from serving.engines import make_model, prompts, serving

# On a GPU a batch of another size is rounded otherwise, and then few of many tokens are not the same few.
OPTIONS = {"budget": 1.0 if torch.cuda.is_available() else 48, "dense_below": 128}
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    asked = json.load(sys.stdin)
    engine = LLM(asked["folder"], **asked["engine"])
    batch = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
    got = [list(x.outputs[0].token_ids) for x in engine.generate(batch, greedy, use_tqdm=False)]
    open(asked["output"], "w").write(json.dumps(got))
"""


@pytest.mark.slow
def test_two_ranks_come_to_the_same_tokens(tmp_path):
    """Constants of keys are measured anew where ranks hold other weights."""
    if torch.cuda.device_count() == 1:
        pytest.skip("needs two GPUs")
    make_model("llama", tmp_path)
    asked = prompts(127, 300, 640)
    # Every prompt in one chunk: which of them come together depends on the processes.
    with serving(tmp_path, OPTIONS, max_num_batched_tokens=2048) as recorded:
        wanted = [tokens for (tokens,) in recorded.generate(asked)]
    engine = {
        "attention_backend": "CUSTOM",
        "additional_config": {"selfindex": OPTIONS},
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "tensor_parallel_size": 2,
    }
    (tmp_path / "program.py").write_text(PROGRAM)
    output = tmp_path / "tokens.json"
    asked = {"folder": str(tmp_path), "engine": engine, "prompts": asked, "output": str(output)}
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "program.py")]
    run = subprocess.run(
        command, input=json.dumps(asked), env=environment, text=True, capture_output=True, timeout=900
    )
    assert output.exists(), run.stderr[-3000:]
    assert json.loads(output.read_text()) == wanted
