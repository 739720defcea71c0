"""Writing new tokens into the engine's full-precision blocks, and gathering some of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .metadata import WindowMetadata


def write_window(window: Tensor, keys: Tensor, values: Tensor, held: WindowMetadata, layer: Any) -> None:
    """Store new tokens [n, H, d]; those whose place is in the null block, or nowhere, are not stored."""
    size, dim = window.shape[2], keys.shape[2]
    if window.device.type == "cuda":
        from vllm import _custom_ops

        slots = held.once("slots", lambda: torch.where(held.slots >= size, held.slots, -1))
        halves = window[..., :dim].transpose(1, 2), window[..., dim:].transpose(1, 2)
        slots = slots[: keys.shape[0]]
        _custom_ops.reshape_and_cache_flash(
            keys, values, *halves, slots, "auto", layer._k_scale, layer._v_scale
        )
        return
    slots = held.slots[: keys.shape[0]]
    real = slots >= size
    block, place = slots[real] // size, slots[real] % size
    window[block, :, place] = torch.cat((keys[real], values[real]), -1)


def gather_window(window: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [n, H, d] of a row's tokens; table int32 [M'], positions int64 [n]."""
    size = window.shape[2]
    found = window[table[positions // size].long(), :, positions % size]
    keys, values = found.chunk(2, -1)
    return keys, values
