"""Which models the cache supports, and which of their layers it compresses."""

from __future__ import annotations

import inspect

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ...config import SelfIndexConfig
from ...errors import UnsupportedModelError
from .wrappers import unwrap

TESTED = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "smollm3", "olmo", "olmo2",
    "olmo3", "gemma3", "gemma3_text", "gpt_oss",
)  # fmt: skip
"""`config.model_type` of families that the test suite runs."""


def cache_argument(model: PreTrainedModel) -> str:
    """Name of a model's cache argument: transformers 5.24 renamed `past_key_values` to `cache`."""
    return "cache" if "cache" in inspect.signature(unwrap(model).forward).parameters else "past_key_values"


def plan_layers(model: PreTrainedModel, config: SelfIndexConfig) -> tuple[Cache, list[int]]:
    """Dense cache layers for the model, and the indices of those to replace by compressed ones.

    Sliding-window and linear-attention layers are bounded already and stay as they are.

    Raises:
        UnsupportedModelError: the model's attention cannot be represented.
    """
    text = model.config.get_text_config(decoder=True)
    kind = text.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind}: encoder-decoder models are not supported, only decoders")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{kind}: multi-head latent attention already stores compressed keys")
    if getattr(text, "attn_logit_softcapping", None):
        raise UnsupportedModelError(f"{kind}: attention with logit soft-capping is not supported")
    tested = kind in TESTED or model.config.model_type in TESTED
    if not tested and not config.allow_untested:
        raise UnsupportedModelError(
            f"{kind}: not among the tested model families ({', '.join(TESTED)}); "
            "pass allow_untested=True if its full-attention layers are plain softmax attention"
        )
    dense = DynamicCache(config=model.config)
    full = [i for i, layer in enumerate(dense.layers) if type(layer) is DynamicLayer]
    if not full:
        raise UnsupportedModelError(
            f"{kind}: no layer with full attention; sliding-window layers are bounded and have "
            "nothing to compress"
        )
    return dense, full
