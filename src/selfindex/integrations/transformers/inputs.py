"""What is asked of the tensors a model hands to the cache."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.utils.output_capturing import _active_collector

from ...codec.rotation import HEAD_DIMS
from ...errors import InputError

NO_GRADIENTS = "the cache is for inference: run the model under torch.no_grad() or inference_mode()"

DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def _may_mix(one: Tensor, other: Tensor) -> bool:
    """Whether tensors have the dtype in common, or autocast is on, which takes them to its own."""
    return one.dtype is other.dtype or torch.is_autocast_enabled(one.device.type)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast is for the model: within this block, logits and codes are computed in float32."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def check_new_tokens(keys: Tensor, values: Tensor, held: Tensor | None) -> None:
    """Check new keys and values against each other and against the keys held, None if there are none.

    Raises:
        InputError: wrong shape, dtype, device or batch size; or they need gradients.
    """
    if held is not None and _like_those_held(keys, values, held):
        return
    if keys.ndim != 4 or keys.shape != values.shape:
        raise InputError(
            "keys and values must both be [batch, heads, tokens, head_dim]; got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if not {keys.dtype, values.dtype} <= DTYPES or not _may_mix(keys, values):
        raise InputError(
            f"keys and values must share a dtype out of float32, float16, bfloat16; "
            f"got {keys.dtype}, {values.dtype}"
        )
    if keys.device != values.device:
        raise InputError(f"keys are on {keys.device}, values on {values.device}")
    if held is not None:
        _check_fit(keys, held)
    if keys.is_meta:
        raise InputError("keys are on the meta device and hold no data; load the model's weights first")
    if not keys.shape[0] or not keys.shape[1]:
        raise InputError(f"keys have shape {tuple(keys.shape)}: without a batch row or a head")
    if keys.shape[3] not in HEAD_DIMS:
        raise InputError(f"head_dim {keys.shape[3]} is not supported; supported are {HEAD_DIMS}")
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise InputError(NO_GRADIENTS)


def _like_those_held(keys: Tensor, values: Tensor, held: Tensor) -> bool:
    """Whether new keys and values are in everything like the keys held, which have been checked."""
    shape, own = keys.shape, held.shape
    return (
        len(shape) == 4
        and shape == values.shape
        and (shape[0], shape[1], shape[3]) == (own[0], own[1], own[3])
        and keys.dtype is values.dtype is held.dtype
        and keys.device == values.device == held.device
        and not torch.is_grad_enabled()
    )


def _check_fit(keys: Tensor, held: Tensor) -> None:
    if keys.shape[0] != held.shape[0]:
        raise InputError(
            f"the cache holds a batch of {held.shape[0]}, got {keys.shape[0]}; use one cache per "
            "batch, or batch_select_indices / batch_repeat_interleave to change it"
        )
    if keys.device != held.device:
        raise InputError(f"the cache holds device {held.device}, got {keys.device}")
    # Concatenation makes the wider dtype of both; a model that is not under autocast has to have that one.
    if torch.promote_types(keys.dtype, held.dtype) != keys.dtype and not _may_mix(keys, held):
        raise InputError(f"the cache holds dtype {held.dtype}, got {keys.dtype}")
    if keys.shape[1::2] != held.shape[1::2]:
        raise InputError(
            f"the cache holds {held.shape[1]} heads of {held.shape[3]}, "
            f"got {keys.shape[1]} of {keys.shape[3]}"
        )


def check_no_weights(options: dict[str, Any] | None) -> None:
    """Raise InputError if the forward pass that is running is to return attention weights.

    Args:
        options: what the model was called with, as far as its version of transformers tells the cache.
    """
    # Where transformers collects outputs that the call, generate or the model's config asked for.
    asked = _active_collector.get()
    if (asked is not None and "attentions" in asked) or (options or {}).get("output_attentions"):
        raise InputError(
            "output_attentions: a compressed layer has no attention weights to return, as it reads only "
            "the tokens it selected; use transformers' DynamicCache for them"
        )


def check_query(query: Tensor, keys: Tensor) -> None:
    """Raise InputError unless queries [B, Hq, T, d] belong to new keys [B, H, T, d]."""
    shape, own = query.shape, keys.shape
    fits = len(shape) == 4 and (shape[0], shape[2], shape[3]) == (own[0], own[2], own[3])
    if not fits or shape[1] % own[1]:
        raise InputError(f"queries {tuple(query.shape)} do not fit keys {tuple(keys.shape)}")
    if query.device != keys.device:
        raise InputError(f"queries and keys must share a device; got {query.device}, {keys.device}")
    if not _may_mix(query, keys):
        raise InputError(f"queries and keys must share a dtype; got {query.dtype}, {keys.dtype}")
