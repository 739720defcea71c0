"""`prompt_statistics`: what pages of the paper preset share, from a prompt's keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codec.paper import prompt_statistics as statistics_of
from .define import define


def _fake(keys: Tensor) -> Tensor:
    return keys.new_empty((keys.shape[0], 18 * keys.shape[2]), dtype=torch.float32)


def prompt_statistics(keys: Tensor) -> Tensor:
    """Measure mean, largest key and codebook of keys [H, N, d], N > 0; see `codec.paper`.

    Returns:
        float32 [H, 18 d].
    """
    return statistics_of(keys)


operator = define(prompt_statistics, _fake)
