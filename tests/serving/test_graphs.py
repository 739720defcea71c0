"""Decode steps as CUDA graphs, across the ends of pages, against the same steps without graphs."""

import pytest
import torch
from serving.engines import make_model, prompts, serving

GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_give_the_tokens_of_steps_without(tmp_path):
    make_model("qwen3-128", tmp_path)
    asked, got = prompts(5, 100, 300, 700, 1500, 2200, seed=3), []
    for graphs in (False, True):
        options = {"compilation_config": GRAPHS, "enforce_eager": False} if graphs else {}
        with serving(
            tmp_path,
            {"budget": 0.05, "dense_below": 128, "min_tokens": 128},
            dtype="bfloat16",
            max_model_len=4096,
            max_num_batched_tokens=1024,
            **options,
        ) as recorded:
            got.append(recorded.generate(asked, 200))
    assert got[0] == got[1]
