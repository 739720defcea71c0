"""Model families by name: those that the test suite runs, and those that are known not to work."""

TESTED = (
    "afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "aya_vision", "bamba", "beam", "biogpt",
    "bitnet", "codegen", "cohere", "cohere2", "cohere2_moe", "cohere2_vision", "cwm", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "falcon_h1", "flex_olmo", "flint", "gemma", "gemma3",
    "gemma3_text", "glm", "glm4", "glm4_moe", "glm4v", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj",
    "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "idefics3", "internlm3",
    "internvl", "iquestcoder", "jais2", "jamba", "laguna", "lfm2", "lfm2_moe", "lfm2_vl", "llama",
    "llama4_text", "llava", "llava_next", "llava_onevision", "mellum", "minimax_m2", "ministral",
    "ministral3", "mistral", "mistral3", "mixtral", "modernbert-decoder", "nanochat", "nemotron",
    "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_5", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "sarvam_moe", "seed_oss",
    "smollm3", "smolvlm", "solar_open", "stablelm", "starcoder2", "vipllava", "zamba", "zamba2", "zaya",
)  # fmt: skip
"""`config.model_type` of the families that the test suite runs; docs/models.md has them as a table."""

REFUSED = {
    "diffllama": "differential attention, which attends to a layer's keys twice, is not supported",
    "doge": "attention that chooses tokens by a mask for each head is not supported",
    "git": "its attention implementation cannot be replaced",
    "jetmoe": "it works on keys between the cache and attention",
    "minimax": "it needs a cache class of its own",
    "xlstm": "it needs a cache class of its own",
}
"""`config.model_type` -> why it is refused, where neither its configuration nor its modules show it."""
