"""Masks and positions of a batch whose second row is padded on the left."""

import torch

LEFT = torch.tensor([[1] * 40, [0] * 11 + [1] * 29])


def grow(mask, new):
    """The mask with `new` more positions of tokens."""
    return torch.cat((mask, torch.ones(mask.shape[0], new, dtype=mask.dtype)), 1)


def positions(mask, new):
    """Position ids of the last `new` positions, as `generate` computes them."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
