"""`prompt_statistics`: what pages of the paper preset share, from a prompt's keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codec.paper import prompt_statistics as statistics_of
from .define import define


def _fake(keys: Tensor) -> Tensor:
    return keys.new_empty((*keys.shape[:-2], 18 * keys.shape[-1]), dtype=torch.float32)


def prompt_statistics(keys: Tensor) -> Tensor:
    """Measure mean, largest key and codebook of the keys of prompts; see `codec.paper`.

    Args:
        keys: [H, N, d] of one prompt, or [B, H, N, d] of several; N > 0.
    Returns:
        float32 [H, 18 d] or [B, H, 18 d], those of each prompt as if it were alone.
    """
    return statistics_of(keys)


operator = define(prompt_statistics, _fake)
