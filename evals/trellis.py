"""Trellis-coded quantisation in 2 bits a channel, simulated: what would a level that depends on its
neighbours' codes save?

Each channel stores 2 bits. Its level is looked up by a window: its own bits and those of the channels
before it, so that the same 2 bits mean other levels in other places, and the encoder picks the path of
least squared error (Viterbi). The form with one table over a sliding window is that of QTIP (arXiv
2406.11235); the first channels see zeros before them. Decoding stays a shift and a look-up.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

BITS = 2
TRAINED, ROUNDS = 2000, 30
"""Gaussian vectors of 128 numbers that a table is fitted to, and how often."""


def paths(x: Tensor, table: Tensor) -> Tensor:
    """Windows of the path of least squared error through x [N, d]: int64 [N, d], indices into table."""
    width = table.shape[0] >> BITS  # states: windows without their oldest bits
    window = torch.arange(table.shape[0], device=x.device)
    cost = torch.full((x.shape[0], width), math.inf, device=x.device)
    cost[:, 0] = 0
    oldest = []
    for channel in x.unbind(1):
        total = (channel[:, None] - table).square_().add_(cost[:, window >> BITS])
        # A window w = oldest * width + state leads to the state of its lower bits.
        cost, best = total.unflatten(1, (-1, width)).min(1)
        oldest.append(best.to(torch.uint8))
    state, out = cost.argmin(1), []
    for best in reversed(oldest):
        out.append(best.gather(1, state[:, None])[:, 0].long() * width + state)
        state = out[-1] >> BITS
    return torch.stack(out[::-1], 1)


@lru_cache
def fitted(states: int, half: bool) -> Tensor:
    """Levels of windows, float32 [4 states]: fitted to a unit Gaussian, or with `half` to its magnitude."""
    generator = torch.Generator("cpu").manual_seed(0)
    size = states << BITS
    x = torch.randn(TRAINED, 128, generator=generator, device="cpu")
    x = x.abs() if half else x
    at = torch.arange(0.5, size, device="cpu") / size
    table = torch.erfinv(at if half else 2 * at - 1) * math.sqrt(2)
    table = table[torch.randperm(size, generator=generator, device="cpu")]
    for _ in range(ROUNDS):
        window = paths(x, table).flatten()
        count = torch.bincount(window, minlength=size)
        total = torch.zeros(size, device="cpu").scatter_add_(0, window, x.flatten())
        table = torch.where(count > 0, total / count.clamp(min=1), table)
    return table


def trellis_levels(x: Tensor, states: int, half: bool) -> Tensor:
    """Levels of x [..., d], which has a mean square of 1 over d; with `half` x is not negative."""
    table = fitted(states, half).to(x.device)
    rows = x.reshape(-1, x.shape[-1]).split(1 << 17)
    return torch.cat([table[paths(part, table)] for part in rows]).view_as(x)
