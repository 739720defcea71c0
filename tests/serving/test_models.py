"""Models that cannot be served: each is refused at start by one sentence, with its own configuration."""

import re

import pytest
import transformers
from serving.engines import VOCAB, serving

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
MODELS = {
    "multi-head latent attention": (
        "DeepseekV2",
        "ForCausalLM",
        SMALL
        | {
            "num_key_value_heads": 4,
            "kv_lora_rank": 64,
            "q_lora_rank": None,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "recurrent layers": (
        "Mamba2",
        "ForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 64,
         "state_size": 16, "n_groups": 1},
    ),
    "recurrent layers ": (
        "FalconH1",
        "ForCausalLM",
        SMALL
        | {"head_dim": 64, "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16,
           "mamba_n_groups": 1},
    ),
    "recurrent layers (Mamba, linear attention)": (
        "Qwen3Next",
        "ForCausalLM",
        SMALL
        | {"head_dim": 64, "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
           "linear_key_head_dim": 32, "linear_value_head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    ),
    "ALiBi": ("Bloom", "ForCausalLM", {"vocab_size": VOCAB, "hidden_size": 256, "n_layer": 2, "n_head": 4}),
    "a softcap on logits": ("Gemma2", "ForCausalLM", SMALL | {"head_dim": 64, "sliding_window": 96}),
    "layers that share another layer's cache": (
        "Gemma3n",
        "ForCausalLM",
        SMALL
        | {"head_dim": 64, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [256] * 4,
           "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 96, "laurel_rank": 8,
           "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB, "altup_num_inputs": 2,
           "activation_sparsity_pattern": [0.0] * 4},
    ),
    "pooling models": ("Bert", "Model", SMALL),
    "encoder-decoder": (
        "Whisper",
        "ForConditionalGeneration",
        {"vocab_size": 51865, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_target_positions": 2048},
    ),
    "head_dim 32 is not supported": ("Llama", "ForCausalLM", SMALL | {"head_dim": 32}),
}  # fmt: skip


@pytest.mark.parametrize("sentence", list(MODELS))
def test_refused_at_start(sentence, tmp_path):
    family, suffix, options = MODELS[sentence]
    name = "Gemma3nTextConfig" if family == "Gemma3n" else f"{family}Config"
    config = getattr(transformers, name)(**options)
    config.architectures = [family + suffix]
    config.save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match=re.escape(sentence.strip())) as raised,
        serving(tmp_path, {}, load_format="dummy", max_num_batched_tokens=2048),
    ):
        pass
    assert "selfindex" in str(raised.value)


def test_a_model_that_generates_is_refused_as_an_embedding_model(tmp_path):
    config = transformers.LlamaConfig(**SMALL, head_dim=64, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match="no encoder-decoder or pooling models"),
        serving(tmp_path, {}, load_format="dummy", max_num_batched_tokens=2048, runner="pooling"),
    ):
        pass
