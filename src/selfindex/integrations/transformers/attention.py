"""The attention function that models run in passes with this cache."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import InputError
from .inputs import NO_GRADIENTS
from .masks import compact_mask, expand_mask
from .new_keys import NewKeys
from .passes import NAMES, running


def dense_attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the model did before it was prepared. Shapes as in `attention_forward`."""
    # Eager attention has no way to be causal without a mask; the others take None for that.
    compact = mask.ndim == 2 if mask is not None else base == "eager"
    if compact and getattr(module, "is_causal", True):
        mask = expand_mask(base, mask, query, key.shape[2], getattr(module, "config", None))
    if base == "eager":
        # Eager attention is not in the registry: every model module defines its own.
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[base]
    return function(module, query, key, value, mask, **kwargs)


def attention_forward(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor | NewKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function registered with transformers.

    Args:
        base: dense implementation to build on.
        query: [B, Hq, T, d]; key: `NewKeys` from a layer of this cache, or dense [B, H, N, d].
        attention_mask: see `compact_mask`.
        kwargs: scaling, dropout and whatever the model passes on.
    Returns:
        (output [B, T, Hq, d], None or the dense implementation's weights).

    Raises:
        InputError: gradients are needed, or an option changes attention in an unsupported way.
    """
    if not isinstance(key, NewKeys):
        return dense_attention(base, module, query, key, value, attention_mask, **kwargs)
    if torch.is_grad_enabled() and query.requires_grad:
        raise InputError(NO_GRADIENTS)
    if key.layer.is_sliding:
        if base not in ("sdpa", "eager"):
            raise InputError(f"{base} takes no masks, which sliding windows of fixed shape need")
        own = partial(dense_attention, base, module, **(kwargs | {"sliding_window": None}))
        return key.layer.attend(query, key, own), None
    window = kwargs.get("sliding_window")
    if window is not None and window >= key.layer.get_seq_length() + query.shape[2]:
        kwargs["sliding_window"] = None  # a window that holds everything so far is full attention
    for option in ("softcap", "sliding_window", "position_bias", "cu_seq_lens_q"):
        if kwargs.get(option) is not None:
            raise InputError(
                f"attention with {option}={kwargs[option]} is not supported in a compressed layer"
            )
    scaling = kwargs.get("scaling")
    if scaling is None:
        kwargs["scaling"] = scaling = query.shape[-1] ** -0.5
    dense = partial(dense_attention, base, module, **kwargs)
    output = key.layer.attend(module, query, key, attention_mask, scaling, kwargs.get("s_aux"), dense)
    return output, None


def mask_function(base: str, **kwargs: Any) -> Any:
    """Mask function registered with transformers; see `compact_mask` for a pass with this cache."""
    if torch.compiler.is_compiling() or running():
        return compact_mask(base, **kwargs)
    # A pass of another thread, with a cache of another kind, while the name is switched.
    return ALL_MASK_ATTENTION_FUNCTIONS[base](**kwargs)


def register() -> None:
    """Make the attention and mask functions known to transformers; safe to repeat."""
    for base, name in NAMES.items():
        AttentionInterface.register(name, partial(attention_forward, base))
        AttentionMaskInterface.register(name, partial(mask_function, base))
