"""A prompt's attention when it is sparse: every block of queries reads the blocks of keys selected for it.

But for the last queries: there a prompt asks what it is about, often in a few words, which the mean of a
block would hide. They read everything, which costs little where prompts are long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import ops
from ..backends.operators.select_blocks import BLOCK
from ..backends.partial import join_parts, merge_parts
from ..config import SelfIndexConfig
from .kernels import attend_plain

EXACT = 2 * BLOCK
"""Queries at the end, at least, that read everything."""


def is_sparse(config: SelfIndexConfig, tokens: int) -> bool:
    """Whether a prompt of so many tokens selects what it reads; up to `dense_below` it reads everything."""
    return config.prefill == "sparse" and tokens > max(config.dense_below, EXACT + BLOCK)


def attend_prompt(
    config: SelfIndexConfig,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    scaling: float,
    sink_logit: Tensor | None = None,
) -> Tensor:
    """Causal attention of whole prompts, sparse where `is_sparse` says so.

    A row is computed without its padding, so that it does not matter what else is in the batch.

    Args:
        query: [B, Hq, T, d]; keys, values: [B, H, T, d], one dtype.
        valid: bool [B, T], False for padding; None if there is none.
        scaling: factor on q.k.
        sink_logit: [Hq], see `merge_parts`.
    Returns:
        [B, Hq, T, d] in the query's dtype; 0 for padding.
    """
    if valid is None:
        return _attend(config, query, keys, values, scaling, sink_logit)
    output = torch.zeros_like(query)
    for b, row in enumerate(valid):
        real = row.nonzero().flatten()
        if len(real):
            q, k, v = (x[b : b + 1].index_select(2, real) for x in (query, keys, values))
            output[b].index_copy_(1, real, _attend(config, q, k, v, scaling, sink_logit)[0])
    return output


def _attend(
    config: SelfIndexConfig,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    sink_logit: Tensor | None,
) -> Tensor:
    """`attend_prompt` without padding."""
    tokens = query.shape[2]
    if is_sparse(config, tokens):
        first = (tokens - EXACT) // BLOCK * BLOCK
        (q, q_last), (k, k_last), (v, v_last) = (x.tensor_split([first], 2) for x in (query, keys, values))
        selection = ops.select_blocks(q, k, scaling, config.prefill_mass, config.prefill_density)
        one, one_lse = ops.block_attend(q, k, v, *selection, scaling)
        earlier = attend_plain(q_last, k, v, scaling, causal=False)
        other, other_lse = join_parts(earlier, attend_plain(q_last, k_last, v_last, scaling, causal=True))
        output = torch.empty_like(query)
        output[:, :, :first], output[:, :, first:] = one, other
        lse = torch.cat((one_lse, other_lse), 2)
    else:
        output, lse = attend_plain(query, keys, values, scaling, causal=True)
    if sink_logit is None:
        return output
    return merge_parts([(output, lse)], sink_logit).to(query.dtype)
