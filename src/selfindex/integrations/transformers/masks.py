"""From transformers' attention masks to the rows of a batch without their padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from ...errors import InputError, StateError


def compact_mask(base: str, **kwargs: Any) -> Tensor | None:
    """Mask function registered with transformers: keeps plain causal masks two-dimensional.

    Returns None (causal without padding, where dense kernels need no mask either), bool [B, columns]
    (causal, False for padding), or, for any other pattern such as a sliding window or a static
    cache, what the mask function of `base` returns.
    """
    past, new, total = kwargs["q_offset"], kwargs["q_length"], kwargs["kv_length"]
    plain = (
        kwargs.get("mask_function") is causal_mask_function
        and kwargs.get("local_size") is None
        and isinstance(past, int)
        and kwargs.get("kv_offset", 0) == 0
        and past + new == total
    )
    if not plain:
        return ALL_MASK_ATTENTION_FUNCTIONS[base](**kwargs)
    padding = kwargs.get("attention_mask")
    # A compiled graph cannot look; the layers do when it runs.
    if padding is not None and (torch.compiler.is_compiling() or not bool(padding.all())):
        return padding[:, :total].bool()
    if past == 0 or new == 1:
        return None
    return torch.ones(kwargs["batch_size"], total, dtype=torch.bool, device=kwargs.get("device"))


def expand_mask(base: str, mask: Tensor | None, query: Tensor, key_length: int, config: Any) -> Tensor | None:
    """Inverse of `compact_mask`: the mask that the dense implementation `base` expects."""
    return ALL_MASK_ATTENTION_FUNCTIONS[base](
        batch_size=query.shape[0],
        q_length=query.shape[2],
        kv_length=key_length,
        q_offset=key_length - query.shape[2],
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=mask,
        allow_is_causal_skip=True,
        dtype=query.dtype,
        config=config,
        device=query.device,
    )


def new_columns(mask: Tensor | None, known: Tensor | None, past: int, new: int, batch: int) -> Tensor | None:
    """Which of the new columns hold tokens, checked against what earlier steps said.

    Args:
        mask: None, bool [B, past + new], or a 4-D causal mask (bool, or additive floats).
        known: bool [B, past] of earlier columns, None if all hold tokens.
    Returns:
        bool [B, new], or None if all new columns hold tokens.

    Raises:
        InputError: the mask is not causal attention with padding, or has another size.
        StateError: the mask hides or shows tokens that earlier steps saw otherwise.
    """
    if mask is None:
        if known is None:
            return None
        # transformers leaves the mask out only if it has no padding anywhere.
        raise StateError(
            "earlier steps had padding, this one has no attention_mask; pass the mask of the whole "
            "sequence at every step"
        )
    if mask.shape[-1] != past + new:
        raise InputError(
            f"attention_mask covers {mask.shape[-1]} tokens, the cache holds {past} and {new} are new"
        )
    columns = mask if mask.ndim == 2 else _columns_of(mask, past, new)
    columns = columns.expand(batch, -1)
    before = torch.ones_like(columns[:, :past]) if known is None else known.to(columns.device)
    if not torch.equal(columns[:, :past], before):
        raise StateError(
            "attention_mask differs from earlier steps for tokens already in the cache; a stored "
            "token cannot be hidden or shown later. Use a new cache, or crop it first"
        )
    fresh = columns[:, past:]
    return None if bool(fresh.all()) else fresh


def _columns_of(mask: Tensor, past: int, new: int) -> Tensor:
    """Padding columns of a 4-D mask [B, 1, new, past + new], which must be causal otherwise."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != new:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected [batch, 1, {new}, {past + new}]"
        )
    seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0]
    columns = seen[:, -1]
    expected = torch.ones(new, past + new, dtype=torch.bool, device=mask.device).tril(past) & columns[:, None]
    real = columns[:, past:]  # rows of padding queries are never read and may hold anything
    if not torch.equal(seen & real[..., None], expected & real[..., None]):
        raise InputError(
            "attention_mask is not causal attention with padding; packed sequences, prefix-LM and "
            "tree masks are not supported by this cache"
        )
    return columns
