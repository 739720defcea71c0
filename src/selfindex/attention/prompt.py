"""Sparse attention of many tokens: every block of queries reads the blocks of keys selected for it.

But for the last queries: there a prompt, or a later chunk, asks what it is about, often in a few words, which
the mean of a block would hide. They read everything, which costs little where there are many tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import ops
from ..backends.operators.select_blocks import BLOCK
from ..config import SelfIndexConfig
from .decoded import attend_split
from .kernels import attend_plain
from .parts import Parts, merge

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

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_last(config, q, k, v, scaling, sink_logit, is_sparse(config, q.shape[2]))

    if valid is None:
        return attend(query, keys, values)
    return by_row(query, keys, values, valid, lambda b, q, k, v: attend(q, k, v))


def by_row(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attention computed row by row, without padding.

    Args:
        query, keys, values, valid: as of `attend_prompt`.
        attend: (number of a row, its query, keys and values, each [1, heads, t, d]) -> [1, Hq, t, d].
    Returns:
        [B, Hq, T, d]; 0 for padding.
    """
    output = torch.zeros_like(query)
    for b in range(query.shape[0]):
        q, k, v = query[b : b + 1], keys[b : b + 1], values[b : b + 1]
        if valid is None:
            output[b] = attend(b, q, k, v)[0]
            continue
        real = valid[b].nonzero().flatten()
        if len(real):
            q, k, v = (x.index_select(2, real) for x in (q, k, v))
            output[b].index_copy_(1, real, attend(b, q, k, v)[0])
    return output


def attend_last(
    config: SelfIndexConfig,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    sink_logit: Tensor | None,
    sparse: bool,
) -> Tensor:
    """Causal attention of the last of a row's tokens to all of them; the very last ones read everything.

    Args:
        query: [B, Hq, T, d], those of the last T tokens; keys, values: [B, H, S, d]; without padding.
        sink_logit: [Hq], see `merge_parts`.
        sparse: whether the others read selected blocks; T is more than EXACT + BLOCK then.
    Returns:
        [B, Hq, T, d] in the query's dtype.
    """
    tokens, new = keys.shape[2], query.shape[2]
    start = tokens - new
    first = (tokens - EXACT) // BLOCK * BLOCK if sparse else start
    output = torch.empty_like(query)
    q, q_last = query.tensor_split([first - start], 2)
    (k, k_last), (v, v_last) = (x.tensor_split([first], 2) for x in (keys, values))
    if sparse:
        selection = ops.select_blocks(q, k, scaling, config.prefill_mass, config.prefill_density)
        found, lse = ops.block_attend(q, k, v, *selection, scaling)
        merge([found], [lse], sink_logit, output[:, :, : first - start])
    parts = Parts()
    for part in attend_split(q_last, k, v, scaling) if first else ():
        parts.add(*part)
    parts.add(*attend_plain(q_last, k_last, v_last, scaling, causal=True))
    parts.write(output[:, :, first - start :], sink_logit)
    return output
