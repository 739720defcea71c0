"""Shapes of known models, to measure speed and memory on random weights: their values do not change it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

POSITIONS = 1 << 20
"""Positions of a random model, whatever those of the model whose shape it has."""

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-1.5b": (
        "Qwen2Config",
        {
            "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8,
        },
    ),
    "gemma-3-270m": (
        "Gemma3TextConfig",
        {
            "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        },
    ),
}  # fmt: skip
"""name -> (configuration class of transformers, its options)."""


def random_model(name: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A model of one of SHAPES with random weights, ready to run."""
    import torch
    import transformers

    kind, shape = SHAPES[name]
    config = getattr(transformers, kind)(max_position_embeddings=POSITIONS, **shape)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
