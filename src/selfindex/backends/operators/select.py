"""`select`: the slots a query reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ...index.select import top_k
from .define import define


def _fake_select(scores: Tensor, budgets: Tensor, width: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], width), dtype=torch.int32)


def select(scores: Tensor, budgets: Tensor, width: int) -> Tensor:
    """Select the best-scored slots, ties to the lower one; see `top_k`.

    Returns:
        int32 [B, H, T, width], -1 past a row's budget.
    """
    return top_k(scores, budgets, width)


operator = define(select, _fake_select)
