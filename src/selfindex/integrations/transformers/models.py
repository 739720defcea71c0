"""Which models the cache supports, and which of their layers it compresses."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
)

from ...codec.rotation import HEAD_DIMS
from ...config import SelfIndexConfig
from ...errors import UnsupportedModelError
from .families import REFUSED, TESTED
from .wrappers import unwrap


def cache_argument(model: PreTrainedModel) -> str:
    """Name of a model's cache argument: transformers 5.24 renamed `past_key_values` to `cache`."""
    return "cache" if "cache" in inspect.signature(unwrap(model).forward).parameters else "past_key_values"


def plan_layers(model: PreTrainedModel, config: SelfIndexConfig) -> tuple[Cache, list[int]]:
    """Dense cache layers for the model, and the indices of those to replace by compressed ones.

    Sliding-window, chunked and linear-attention layers are bounded already and stay as they are.

    Raises:
        UnsupportedModelError: the model's attention cannot be represented.
    """
    text = model.config.get_text_config(decoder=True)
    kind = model.config.model_type
    reason = REFUSED.get(kind) or REFUSED.get(text.model_type) or _reason_in_config(model, text)
    if reason:
        raise UnsupportedModelError(f"{kind}: {reason}")
    try:
        dense = DynamicCache(config=model.config)
    except Exception as error:
        raise UnsupportedModelError(f"{kind}: transformers cannot make a cache for it: {error}") from error
    full = [i for i, layer in enumerate(dense.layers) if _is_full(layer, text)]
    if not full:
        found = sorted({type(x).__name__ for x in dense.layers})
        raise UnsupportedModelError(
            f"{kind}: no layer with full attention, only {', '.join(found)}; layers with a window "
            "or a linear-attention state are bounded and have nothing to compress"
        )
    for name, module in _attention_modules(model, text, full):
        reason = _reason_in_module(module, text)
        if reason:
            raise UnsupportedModelError(f"{kind}: {name}: {reason}")
    if kind not in TESTED and not config.allow_untested:
        raise UnsupportedModelError(
            f"{kind}: not among the tested model families (docs/models.md lists them); pass "
            "allow_untested=True if its full-attention layers are plain softmax attention"
        )
    return dense, full


def _is_full(layer: Any, text: Any) -> bool:
    """Whether a layer's cache grows with every token."""
    if type(layer) is DynamicSlidingWindowLayer:
        # As in Phi-3.5-mini: a window that holds all the positions there are.
        return layer.sliding_window >= (getattr(text, "max_position_embeddings", None) or float("inf"))
    return type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def _reason_in_config(model: PreTrainedModel, text: Any) -> str | None:
    """What the configuration says against a model; None if nothing."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "encoder-decoder models are not supported, only decoders"
    if getattr(text, "kv_lora_rank", None):
        return "multi-head latent attention already stores compressed keys"
    if getattr(text, "attn_logit_softcapping", None):
        return "attention with logit soft-capping is not supported"
    if getattr(text, "alibi", False):
        return "attention with a position bias (ALiBi) is not supported"
    if getattr(text, "num_kv_shared_layers", None):
        return "layers that attend to the keys of other layers are not supported"
    parts = [model, *(x for x in model.modules() if isinstance(x, PreTrainedModel) and x.config is text)]
    closed = next((x for x in parts if not x._can_set_attn_implementation()), None)
    if closed is not None:
        return f"{type(closed).__name__} does not let its attention implementation be replaced"
    return None


def _attention_modules(model: PreTrainedModel, text: Any, full: list[int]) -> list[tuple[str, nn.Module]]:
    """The text model's attention modules that serve layers `full`, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "is_causal")
        and getattr(module, "config", None) is text
        # Blocks that several layers share have no number, or a negative one.
        and ((i := getattr(module, "layer_idx", None)) is None or i < 0 or i in full)
    ]


def _reason_in_module(module: nn.Module, text: Any) -> str | None:
    """What an attention module says against a model; None if nothing."""
    if not module.is_causal:
        return "attends to later tokens as well (is_causal=False), and the cache is for causal attention"
    dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    dim = dim or text.hidden_size // text.num_attention_heads
    if dim not in HEAD_DIMS:
        return f"head_dim {dim} is not supported; supported are {HEAD_DIMS}"
    values = getattr(module, "v_head_dim", None) or getattr(text, "v_head_dim", None) or dim
    if values != dim:
        return f"values of {values} channels and keys of {dim} are not supported; they have to be equal"
    return None
