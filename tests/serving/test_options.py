"""What is refused at start, each with one sentence, and what the options turn into."""

import pytest
import torch
from serving.engines import make_model, prompts, serving

from selfindex.versions import vllm_problem


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", folder)
    return folder


@pytest.mark.parametrize(
    ("selfindex", "engine", "sentence"),
    [
        ({"budget": 2.0}, {}, "a float budget"),
        ({"buget": 0.1}, {}, "unknown option buget"),
        ("fast", {}, "must hold options by name"),
        ({"preset": "paper", "profile": "balance.safetensors"}, {}, "takes its statistics"),
        ({"preset": "paper", "page_size": 64}, {}, "sinks may be at most half a page"),
        ({"prefill": "sparse"}, {}, "prefill='sparse' is not supported"),
        ({"offloading": True}, {}, "offloading"),
        ({"compile": True}, {}, "the engine's own options"),
        ({"sparse_queries": 100}, {}, "sparse_queries may be at most 8"),
        ({"page_size": 40}, {}, "multiple of 16"),
        ({"sinks": 100}, {}, "sinks may be at most"),
        ({"pinned_tokens": 64}, {}, "pinned_tokens is not supported in vLLM"),
        ({}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({}, {"block_size": 64}, "--block-size 64"),
        ({}, {"disable_hybrid_kv_cache_manager": True}, "hybrid KV cache manager"),
        ({}, {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({}, {"attention_backend": None}, "has to be chosen"),
        (
            {"recent": 2},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
            "num_speculative_tokens is 3",
        ),
        (
            {},
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "KV connectors",
        ),
        ({}, {"kv_offloading_size": 1.0}, "KV connectors"),
        ({}, {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "context parallelism"),
    ],
)
def test_refused_before_anything_is_built(folder, selfindex, engine, sentence):
    if torch.cuda.device_count() == 1 and any(name.endswith("parallel_size") for name in engine):
        pytest.skip("vLLM itself asks for two GPUs")
    with pytest.raises(ValueError, match=sentence), serving(folder, selfindex, **engine):
        pass


def test_the_backend_without_its_option_is_refused_where_it_was_chosen(folder):
    with (
        pytest.raises(Exception, match=r"start vLLM with|Engine core"),
        serving(folder, None, attention_backend="CUSTOM"),
    ):
        pass


@pytest.mark.no_engine
@pytest.mark.parametrize(
    ("version", "served"),
    [("0.26.0", True), ("0.27.1+cu130", True), ("0.28.0", False), ("0.32.0", True), ("0.34.0", False),
     ("1.0.0", False), (None, False)],
)  # fmt: skip
def test_versions(version, served):
    problem = vllm_problem(version)
    assert (problem is None) == served
    assert served or "vLLM" in problem


def test_an_engine_without_the_option_is_as_ever(folder):
    with serving(folder, None) as recorded:
        recorded.generate(prompts(40), 4)
        assert not any(name.endswith(".window") for name in recorded.layers)
        assert not recorded.constants()
