"""Model families that cannot work, each with options of a tiny model and what the refusal says."""

import torch
import transformers
from families import BASE
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LATENT = "multi-head latent attention already stores compressed keys"
CLOSED = "does not let its attention implementation be replaced"
BOUNDED = "no layer with full attention"
DIFFERENTIAL = "differential attention, which attends to a layer's keys twice, is not supported"
SHARED = "layers that attend to the keys of other layers are not supported"
TWO_SIDED = "attends to later tokens as well"

_PER_LAYER = {
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": [64] * 3,
}
_WINDOW = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 16,
}
_MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}

REFUSED = {
    "bert": ({}, TWO_SIDED),
    "bloom": ({}, CLOSED),
    "deepseek_v2": ({}, LATENT),
    "deepseek_v3": ({}, LATENT),
    "diffllama": (
        {"num_key_value_heads": 2},
        "differential attention, which attends to a layer's keys twice, is not supported",
    ),
    "doge": ({}, "attention that chooses tokens by a mask for each head is not supported"),
    "falcon": ({"alibi": True}, "a position bias (ALiBi) is not supported"),
    "gemma2": ({"attn_logit_softcapping": 50.0}, "attention with logit soft-capping is not supported"),
    "gemma3n_text": (
        _WINDOW | _PER_LAYER | {"num_kv_shared_layers": 1},
        "layers that attend to the keys of other layers are not supported",
    ),
    "gemma4_text": (
        _WINDOW | _PER_LAYER | {"intermediate_size": 64, "global_head_dim": 512},
        "head_dim 512 is not supported",
    ),
    "git": ({}, "its attention implementation cannot be replaced"),
    "glm4_moe_lite": ({}, LATENT),
    "jetmoe": ({"kv_channels": 64}, "it works on keys between the cache and attention"),
    "kimi_linear": ({}, LATENT),
    "llama": ({"head_dim": 48}, "head_dim 48 is not supported"),
    "longcat_flash": ({}, LATENT),
    "mamba": ({}, BOUNDED),
    "mimo_v2_flash": (
        {"v_head_dim": 128, "n_routed_experts": 2},
        "values of 128 channels and keys of 64 are not supported",
    ),
    "minicpm3": ({}, LATENT),
    "minimax": (_MOE, "it needs a cache class of its own"),
    "mistral": ({"sliding_window": 16}, BOUNDED),
    "mpt": ({}, CLOSED),
    "vaultgemma": ({"attn_logit_softcapping": 50.0}, "attention with logit soft-capping is not supported"),
    "xglm": ({}, CLOSED),
    "xlstm": ({}, "it needs a cache class of its own"),
}


def refused_model(family):
    """A model without weights, which is all that a refusal needs."""
    options = BASE | REFUSED[family][0]
    try:
        config = CONFIG_MAPPING[family](**options)
    except AttributeError:  # families whose head_dim follows from the others
        config = CONFIG_MAPPING[family](**{k: v for k, v in options.items() if k != "head_dim"})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)
