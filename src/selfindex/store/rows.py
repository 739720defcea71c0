"""Which tokens of a row are encoded and which are kept, when new ones come ("balanced")."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import SelfIndexConfig
from .change import RowChange
from .window import Window


def leave_window(
    config: SelfIndexConfig, window: Window, row: int, new_k: Tensor, new_v: Tensor, written: int = 0
) -> RowChange:
    """Whole pages leave the window, right behind its front.

    Args:
        new_k, new_v: [H, n, d].
        written: tokens behind those that the row counts as held and before the new ones, which are its own.
    """
    held = window.lengths[row] + written
    k, v = new_k, new_v
    if held:
        k = torch.cat((window.keys[row, :, :held], new_k), 1)
        v = torch.cat((window.values[row, :, :held], new_v), 1)
    beyond = max(0, k.shape[1] - config.front - config.recent)
    first, last = config.front, config.front + beyond // config.page_size * config.page_size
    kept = [torch.cat((x[:, :first], x[:, last:]), 1) for x in (k, v)]
    return RowChange((k[:, first:last], v[:, first:last]), (kept[0], kept[1]))
