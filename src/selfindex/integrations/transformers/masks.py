"""From transformers' attention masks to the rows of a batch without their padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from ...errors import InputError, StateError

HIDDEN = -1e4
"""Additive masks hide with this or less, so that no weight is left in any dtype."""


def compact_mask(base: str, **kwargs: Any) -> Tensor | None:
    """Mask function registered with transformers: keeps plain causal masks two-dimensional.

    Returns None (causal without padding, where dense kernels need no mask either), bool [B, positions]
    (causal, False for padding), or, for any other pattern such as a sliding window or a static
    cache, what the mask function of `base` returns.

    Raises:
        InputError: a layer with a ring has another mask than a sliding window.
    """
    past, new, total = kwargs["q_offset"], kwargs["q_length"], kwargs["kv_length"]
    if new and total == 0:  # a `SlidingWindowLayer` in a step of fixed shape, which makes its own mask
        check_window(kwargs["mask_function"], kwargs["kv_offset"])
        return None
    plain = (
        kwargs.get("mask_function") is causal_mask_function
        and kwargs.get("local_size") is None
        and isinstance(past, int)
        and kwargs.get("kv_offset", 0) == 0
        and past + new == total
    )
    padding = kwargs.get("attention_mask")
    if not plain or (padding is not None and padding.ndim != 2):
        return ALL_MASK_ATTENTION_FUNCTIONS[base](**kwargs)
    # A compiled graph cannot look; the layers do when it runs.
    if padding is not None and (torch.compiler.is_compiling() or not bool(padding.all())):
        return padding[:, :total].bool()
    if past == 0 or new == 1:
        return None
    return torch.ones(kwargs["batch_size"], total, dtype=torch.bool, device=kwargs.get("device"))


def check_window(sees: Callable[..., Tensor], window: int) -> None:
    """Raise InputError if a mask function is another than that of a causal sliding window."""
    query, key = torch.tensor(2 * window + 3, device="cpu"), torch.arange(3 * window + 6, device="cpu")
    row = torch.zeros((), dtype=torch.long, device="cpu")
    if not torch.equal(sees(row, row, query, key), (key <= query) & (key > query - window)):
        raise InputError(
            f"masks of another kind than a sliding window of {window} tokens have no fixed shape"
        )


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


NOT_CAUSAL = (
    "attention_mask is not causal attention with padding: packed sequences, tree masks and tokens that see "
    "later ones after the first chunk of a sequence are not supported by this cache"
)


def new_positions(
    mask: Any, known: Tensor | None, past: int, new: int, batch: int
) -> tuple[Tensor | None, Tensor | None]:
    """What a mask says of the new positions and of earlier ones, checked against what earlier steps said.

    Args:
        mask: None, bool [B, past + new], or a 4-D mask (bool, or additive floats) that is causal. In the
            first chunk of a sequence, tokens may see later ones too: image blocks, prefix-LM.
        known: bool [B, past] of earlier positions, None if all hold tokens.
    Returns:
        which new positions hold tokens, bool [B, new], None if all do; and which earlier positions go on
        doing so, bool [B, past], None if nothing changes. What goes is the end of its row.

    Raises:
        InputError: the mask is of another kind, or of another size.
        StateError: the mask hides tokens that are not the last of their row, or shows hidden ones.
    """
    if mask is None:
        if known is None:
            return None, None
        # transformers leaves the mask out only if it has no padding anywhere.
        raise StateError(
            "earlier steps had padding, this one has no attention_mask; pass the mask of the whole "
            "sequence at every step"
        )
    if not isinstance(mask, Tensor) or mask.is_meta or mask.ndim not in (2, 4):
        shape = f" of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
        raise InputError(
            f"attention_mask is a {type(mask).__name__}{shape}; expected a tensor with data, [batch, tokens] "
            "or [batch, 1, new tokens, tokens]"
        )
    if mask.shape[-1] != past + new or mask.shape[0] not in (1, batch):
        raise InputError(
            f"attention_mask covers {mask.shape[-1]} tokens of {mask.shape[0]} rows; the cache holds {past} "
            f"and {new} are new, in {batch} rows"
        )
    positions = mask.bool() if mask.ndim == 2 else _positions_of(mask, past, new)
    positions = positions.expand(batch, -1)
    now, fresh = positions[:, :past], positions[:, past:]
    before = torch.ones_like(now) if known is None else known.to(now.device)
    if mask.ndim == 4:
        # A row without a new token has no query to say what it sees.
        now = torch.where(fresh.any(1, keepdim=True), now, before)
    hidden = before & ~now
    if bool((now & (~before | (hidden.cumsum(1) > 0))).any()):
        raise StateError(
            "attention_mask differs from earlier steps for tokens already in the cache; only the last "
            "tokens of a row can be hidden later, and none shown again. Use a new cache, or crop it first"
        )
    return None if bool(fresh.all()) else fresh, now if bool(hidden.any()) else None


def _positions_of(mask: Tensor, past: int, new: int) -> Tensor:
    """Columns with tokens, bool [rows, past + new], of a 4-D mask as `new_positions` takes it."""
    if mask.shape[1:3] != (1, new):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected [batch, 1, {new}, {past + new}]"
        )
    if mask.dtype == torch.bool:
        seen = mask[:, 0]
    elif mask.is_floating_point():
        seen = mask[:, 0] == 0
        if not bool((seen | (mask[:, 0] <= HIDDEN)).all()):
            raise InputError(
                "attention_mask adds a bias to logits; this cache knows masks of 0 and of the dtype's minimum"
            )
    else:
        raise InputError(f"a 4-D attention_mask is bool or additive floats, got {mask.dtype}")
    # Queries of padding may see nothing, themselves or, as some kernels need it, everything.
    everything = seen.all(-1, keepdim=True)
    everything[:, -1] = False
    told = seen & ~everything
    positions = told.any(1)
    fits = _fits(seen, positions, past)
    if not bool(fits.all()):
        # Padding whose queries see themselves and nothing else: nobody else sees it.
        lonely = told.sum(-1) == 1
        lonely[:, -1] = False
        told.diagonal(past, 1, 2).logical_and_(~lonely)
        positions = torch.where(fits[:, None], positions, told.any(1))
        if not bool(_fits(seen, positions, past).all()):
            raise InputError(NOT_CAUSAL)
    return positions


def _fits(seen: Tensor, positions: Tensor, past: int) -> Tensor:
    """Rows in which every token sees all tokens before it and, but for the first chunk, no others."""
    causal = torch.ones(seen.shape[1:], dtype=torch.bool, device=seen.device).tril(past) & positions[:, None]
    wrong = causal & ~seen if past == 0 else causal ^ seen
    wrong |= seen & ~positions[:, None]
    return ~(wrong & positions[:, past:, None]).flatten(1).any(1)
