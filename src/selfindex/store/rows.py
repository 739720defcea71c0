"""Which tokens of a row are encoded and which are kept, when new ones come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import ops
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
) -> list[RowChange]:
    """Paper preset: pinned tokens stay in full precision, the rest of the prompts is encoded.

    Tokens after the first `prompt` are not part of them: they are kept like those of later steps.

    Args:
        k, v: [B, H, n, d]; q: [B, Hq, n, d].
    """
    queries = q[:, :, -OBSERVED_QUERIES:].unflatten(1, (k.shape[1], -1))
    pinned = choose_pinned(k, queries, config.sinks, scaling, prompt)
    # The j-th of the other tokens comes after as many pinned ones as have at most j others before them.
    before = pinned - torch.arange(int(config.sinks), device=k.device)
    rest = torch.arange(prompt - config.sinks, device=k.device).expand(*k.shape[:2], -1)
    rest = rest + torch.searchsorted(before, rest.contiguous(), right=True)
    row = torch.arange(k.shape[0], device=k.device)[:, None, None]
    head = torch.arange(k.shape[1], device=k.device)[:, None]
    encoded = zip(*(x[row, head, rest] for x in (k, v)), strict=True)
    kept = zip(*(torch.cat((x[row, head, pinned], x[:, :, prompt:]), 2) for x in (k, v)), strict=True)
    constants = ops.prompt_statistics(k[:, :, :prompt])
    return [RowChange(*parts, prompt) for parts in zip(encoded, kept, constants, strict=True)]
