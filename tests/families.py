"""Tiny random text models of the families beyond `tiny_models`, by `config.model_type`.

`tiny_models.FAMILIES` are the few that every kind of test runs over; test_more_families.py runs
these. Values are options of the family's configuration on top of `BASE`.
"""

import copy
from functools import lru_cache

import torch
import transformers
from tiny_models import SPECS, VOCAB
from tiny_models import pair as tiny_pair
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # with the default, every token gets the same weight
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MOE = {
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
_THREE = {"num_hidden_layers": 3}
_WINDOW = _THREE | {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 16,
}
_LINEAR = _THREE | {"layer_types": ["linear_attention", "full_attention", "full_attention"]}
_CONV = _THREE | {"layer_types": ["conv", "full_attention", "full_attention"]}
_DELTA = _LINEAR | {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_chunk_size": 16}
_HYBRID_BLOCKS = {"layers_block_type": ["linear_attention", "linear_attention", "hybrid"]}


def _dim(head_dim):
    """With two heads, also where the head dimension follows from the hidden size."""
    return {"head_dim": head_dim, "hidden_size": 2 * head_dim}


DENSE = {
    "apertus": {},
    "apertus1p5_text": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "codegen": {"rotary_dim": 32},
    "cohere": _dim(128),
    "ernie4_5": {},
    "exaone": {},
    "gemma": {"head_dim": 256},
    "glm": _dim(128),
    "glm4": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": _dim(96),
    "gptj": {"rotary_dim": 32},
    "granite": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "ministral3": {"head_dim": 128},
    "nanochat": {},
    "nemotron": _dim(192) | {"initializer_range": 0.05},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 128},
    "persimmon": {},
    "phi": _dim(80),
    "seed_oss": {"head_dim": 128},
    "stablelm": _dim(80),
    "starcoder2": {"sliding_window": None},
}
EXPERTS = {
    "aria_text": _MOE,
    "dots1": _MOE,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "flex_olmo": _MOE,
    "flint": _MOE | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 32},
    "glm4_moe": _MOE | {"first_k_dense_replace": 1},
    "granitemoe": _MOE,
    "granitemoeshared": _MOE,
    "hunyuan_v1_moe": _MOE | {"moe_topk": 2},
    "hy_v3": _MOE,
    "minimax_m2": _MOE,
    "mixtral": _MOE | {"sliding_window": None},
    "olmoe": _MOE,
    "phimoe": _MOE | {"sliding_window": None},
    "qwen2_moe": _MOE | {"shared_expert_intermediate_size": 32},
    "sarvam_moe": _MOE,
    "solar_open": _MOE,
}
WINDOWS = {
    "afmoe": _MOE | _WINDOW | {"num_dense_layers": 1, "num_shared_experts": 1},
    "beam": _WINDOW,
    "cohere2": _WINDOW,
    "cohere2_moe": _MOE | _WINDOW,
    "cwm": _WINDOW,
    "exaone4": _WINDOW,
    "exaone_moe": _MOE
    | _WINDOW
    | {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_shared_experts": 1},
    "granite_swa": _WINDOW,
    "granitemoe_swa": _MOE | _WINDOW,
    "laguna": _MOE | _WINDOW,
    "llama4_text": _MOE
    | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "intermediate_size_mlp": 64, "moe_layers": [1]}
    | {"layer_types": ["chunked_attention", "full_attention", "full_attention"], "attention_chunk_size": 16},
    "mellum": _MOE | _WINDOW,
    "ministral": _WINDOW,
    "modernbert-decoder": _WINDOW,
}
STATES = {
    "bamba": _MAMBA2 | _THREE | {"attn_layer_indices": [1, 2]},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 256},
    "granitemoehybrid": _MOE | _LINEAR | _MAMBA2 | {"shared_intermediate_size": 32},
    "jamba": _MOE
    | _THREE
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"mamba_dt_rank": 8, "use_mamba_kernels": False},
    "lfm2": _CONV,
    "lfm2_moe": _MOE | _CONV | {"num_dense_layers": 1},
    "nemotron_h": _MOE
    | {"layer_types": ["linear_attention", "full_attention", "moe", "full_attention"], "num_hidden_layers": 4}
    | {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 16}
    | {"moe_shared_expert_intermediate_size": 32},
    "olmo_hybrid": _DELTA,
    "qwen3_5_moe_text": _MOE | _DELTA | {"shared_expert_intermediate_size": 32},
    "qwen3_5_text": _DELTA | {"head_dim": 256},
    "qwen3_next": _MOE | _DELTA | {"shared_expert_intermediate_size": 32, "head_dim": 256},
    "zamba": _THREE
    | _HYBRID_BLOCKS
    | {"attn_layer_period": 3, "attn_layer_offset": 2, "attention_head_dim": 128, "use_mamba_kernels": False},
    "zamba2": _THREE | _HYBRID_BLOCKS | {"mamba_d_state": 16, "n_mamba_heads": 4, "chunk_size": 16},
    "zaya": {"num_experts": 4, "num_experts_per_tok": 1},
}
MORE = DENSE | EXPERTS | WINDOWS | STATES
_EAGER = ("granite_swa", "granitemoe_swa", "flint")
"""Their sinks are not implemented for sdpa."""


def available(family):
    """Whether this version of transformers has the family, attention that can be replaced included."""
    if family not in CONFIG_MAPPING:
        return False
    model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    return family in _EAGER or model._supports_sdpa


def compressed(family):
    """How many layers are compressed: all but those that are bounded."""
    layers = MORE[family].get("layer_types") or MORE[family].get("layers_block_type")
    if layers is None:
        return {"jamba": 1}.get(family, 2)
    return sum(kind in ("full_attention", "hybrid") for kind in layers)


def head_dim(family):
    """The head dimension of the compressed layers."""
    return (BASE | MORE[family])["head_dim"]


def make_config(family):
    """The family's tiny configuration."""
    return CONFIG_MAPPING[family](**(BASE | MORE[family]))


def any_pair(family):
    """`pair` of a family of this file, or of tiny_models."""
    return tiny_pair(family) if family in SPECS else pair(family)


@lru_cache(maxsize=4)
def pair(family):
    """(untouched model, equal model to be used with the cache), shared between tests."""
    torch.manual_seed(0)
    attention = "eager" if family in _EAGER else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(make_config(family), attn_implementation=attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.normal_(std=2.0)
    return model.eval(), copy.deepcopy(model)
