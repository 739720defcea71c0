"""Attention of new queries over the full-precision tokens: those held, and the new ones causally."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..store.window import Window
from .kernels import attend_masked, attend_plain
from .parts import merge
from .shared import Shared

FEW_QUERIES = 256
"""New tokens a row up to which attention goes through a mask; for more the mask would be what costs."""


def exact_part(
    window: Window,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    scaling: float,
    shared: Shared,
) -> tuple[Tensor, Tensor]:
    """Attend to all held tokens and, causally, to the new ones; memory is linear in their number.

    Args:
        query: [B, Hq, T, d]; keys, values: [B, H, T, d], the new tokens.
        valid: bool [B, T], False for padding; None if there is none.
        scaling: factor on q.k.
        shared: common to the layers of a forward pass.
    Returns:
        (output [B, Hq, T, d] in float32 or the query's dtype, log-sum-exp float32 [B, Hq, T]).
        Queries of padding get numbers without a meaning, but finite ones.
    """
    lengths = window.lengths
    if query.shape[2] <= FEW_QUERIES:
        held_k, held_v, _ = window.held()
        key = "bias", query.device, query.dtype, tuple(lengths), query.shape[2], id(valid)
        # The entry keeps `valid`, so that no other tensor gets its id.
        bias, _ = shared.once(key, lambda: (_bias(lengths, query, valid), valid))
        new_k, new_v = torch.cat((held_k, keys), 2), torch.cat((held_v, values), 2)
        return attend_masked(query, new_k, new_v, bias, scaling)
    if valid is None and len(set(lengths)) == 1:
        held = window.keys[:, :, : lengths[0]], window.values[:, :, : lengths[0]]
        return _causal(*held, query, keys, values, scaling)
    # Without its padding a row needs no mask.
    output = torch.zeros_like(query)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    for b, length in enumerate(lengths):
        real = slice(None) if valid is None or bool(valid[b].all()) else valid[b].nonzero().flatten()
        q, k, v = (x[b : b + 1][:, :, real] for x in (query, keys, values))
        if q.shape[2]:
            held = window.keys[b : b + 1, :, :length], window.values[b : b + 1, :, :length]
            part = _causal(*held, q, k, v, scaling)
            output[b][:, real], lse[b][:, real] = part[0][0], part[1][0]
    return output, lse


def _causal(
    held_k: Tensor, held_v: Tensor, query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention to all of the held tokens and, causally, to the new ones."""
    held = held_k.shape[2]
    if held > query.shape[2]:
        parts = [attend_plain(query, k, v, scaling, causal) for k, v, causal in
                 ((held_k, held_v, False), (keys, values, True))]  # fmt: skip
        whole = torch.empty_like(query)
        return whole, merge([x[0] for x in parts], [x[1] for x in parts], None, whole)
    # Kernels are causal for as many queries as keys: queries of no use for the held tokens cost
    # less than a second part, whose merging takes as long as attention on a GPU.
    padded = pad(query, (0, 0, held, 0)) if held else query
    joined = [torch.cat(x, 2) if held else x[1] for x in ((held_k, keys), (held_v, values))]
    output, lse = attend_plain(padded, joined[0], joined[1], scaling, causal=True)
    return output[:, :, held:], lse[:, :, held:]


def _bias(lengths: list[int], query: Tensor, valid: Tensor | None) -> Tensor:
    """What `attend_masked` adds to the logits: [B or 1, 1, T, width + T] in the query's dtype."""
    new, width, device = query.shape[2], max(lengths), query.device
    hidden = torch.ones(1, new, new, dtype=torch.bool, device=device).triu(1)
    if valid is not None:
        # A query sees itself: none is left without a key, and nobody reads those of padding.
        other = ~torch.eye(new, dtype=torch.bool, device=device)
        hidden = hidden | (~valid[:, None] & other)
    held = torch.arange(width, device=device) >= torch.tensor(lengths, device=device)[:, None, None]
    if len(set(lengths)) == 1:
        held = held[:1]
    rows = max(len(hidden), len(held))
    hidden = torch.cat((held.expand(rows, new, -1), hidden.expand(rows, -1, -1)), -1)[:, None]
    return torch.zeros(hidden.shape, dtype=query.dtype, device=device).masked_fill(hidden, -torch.inf)
