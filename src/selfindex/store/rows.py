"""Which tokens of a row are encoded and which are kept, when new ones come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec.paper import choose_pinned
from ..config import SelfIndexConfig
from .change import RowChange
from .window import Window

OBSERVED_QUERIES = 32
"""Last prompt queries that vote for the paper preset's full-precision tokens."""

LONGEST_DRAFT = 128
"""Last tokens of a paper preset's first chunk that do not count as its prompt where drafts may follow it."""


def leave_window(
    config: SelfIndexConfig, window: Window, row: int, new_k: Tensor, new_v: Tensor, written: int = 0
) -> RowChange:
    """Whole pages leave the front of the window, right behind the sinks.

    Args:
        new_k, new_v: [H, n, d].
        written: tokens behind those that the row counts as held and before the new ones, which are its own.
    """
    held = window.lengths[row] + written
    k, v = new_k, new_v
    if held:
        k = torch.cat((window.keys[row, :, :held], new_k), 1)
        v = torch.cat((window.values[row, :, :held], new_v), 1)
    beyond = max(0, k.shape[1] - config.sinks - config.recent)
    first, last = config.sinks, config.sinks + beyond // config.page_size * config.page_size
    kept = [torch.cat((x[:, :first], x[:, last:]), 1) for x in (k, v)]
    return RowChange((k[:, first:last], v[:, first:last]), (kept[0], kept[1]))


def keep_pinned(
    config: SelfIndexConfig, k: Tensor, v: Tensor, q: Tensor, scaling: float, prompt: int
) -> RowChange:
    """Paper preset: pinned tokens stay in full precision, the rest of the prompt is encoded.

    Tokens after the first `prompt` are not part of it: they are kept like those of later steps.

    Args:
        k, v: [H, n, d]; q: [Hq, n, d].
    """
    queries = q[:, -OBSERVED_QUERIES:].unflatten(0, (k.shape[0], -1))
    pinned = choose_pinned(k, queries, config.sinks, scaling, prompt)
    rest = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device).scatter(1, pinned, False)
    rest[:, prompt:] = False
    shape = (k.shape[0], prompt - config.sinks, k.shape[2])
    at = pinned[..., None].expand(-1, -1, k.shape[2])
    kept = [torch.cat((x.gather(1, at), x[:, prompt:]), 1) for x in (k, v)]
    return RowChange((k[rest].view(shape), v[rest].view(shape)), (kept[0], kept[1]), k[:, :prompt])
