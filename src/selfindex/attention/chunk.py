"""Sparse attention of a long chunk to a row's earlier tokens and to itself, as of a prompt (prompt.py).

Encoded tokens are decoded to memory once, between the sinks and the other full-precision tokens, where they
were in the text: blocks are selected from, and read, as if all of the row were a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import SelfIndexConfig
from ..store import LayerStore
from .decoded import STAGED_PAGES, decode, even, pages_at_a_time
from .prompt import EXACT, attend_last, by_row

FEWEST_QUERIES = 2 * EXACT
"""New tokens of a row up to which they read everything: most of them would as the last ones."""
MOST_SCRATCH = 1 << 30
"""Bytes of a row's keys and values at a time; of more, as many KV heads as fit, but one at least."""


def is_sparse_chunk(config: SelfIndexConfig, tokens: int, new: int) -> bool:
    """Whether the last `new` of a row's tokens, behind earlier ones, select what they read."""
    return config.prefill == "sparse" and new > FEWEST_QUERIES and tokens > config.dense_below


def attend_chunk(
    store: LayerStore,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    scaling: float,
    sink_logit: Tensor | None,
) -> Tensor:
    """Attention of new tokens to stored ones and, causally, to themselves: row by row, without padding.

    Rows of which `is_sparse_chunk` does not hold read everything. Arguments and result as of `attend`.
    """

    def attend(b: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(store, b, q, k, v, scaling, sink_logit)

    return by_row(query, keys, values, valid, attend)


def _attend(
    store: LayerStore,
    b: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    sink_logit: Tensor | None,
) -> Tensor:
    """`attend_chunk` of row b: query [1, Hq, T, d]; keys, values [1, H, T, d]."""
    config, window, held = store.config, store.window, store.window.lengths[b]
    encoded, (kv_heads, new, dim) = store.encoded(b), keys.shape[1:]
    front, tokens = min(config.front, held), held + encoded + new
    sparse = is_sparse_chunk(config, tokens, new)
    step = even(kv_heads, MOST_SCRATCH // (2 * tokens * dim * query.element_size()))
    groups, output = query.shape[1] // kv_heads, torch.empty_like(query)
    for first in range(0, kv_heads, step):
        heads = slice(first, min(kv_heads, first + step))
        room = query.new_empty(2, heads.stop - first, tokens, dim)
        _decode(store, b, heads, room[:, :, front : front + encoded])
        for to, old, fresh in zip(room, (window.keys, window.values), (keys, values), strict=True):
            to[:, :front] = old[b, heads, :front]
            to[:, front + encoded : -new] = old[b, heads, front:held]
            to[:, -new:] = fresh[0, heads]
        asking = slice(first * groups, heads.stop * groups)
        sink = None if sink_logit is None else sink_logit[asking]
        own_k, own_v = room[:, None]
        output[:, asking] = attend_last(config, query[:, asking], own_k, own_v, scaling, sink, sparse)
    return output


def _decode(store: LayerStore, b: int, heads: slice, room: Tensor) -> None:
    """Decode all of a row's pages to the keys and values [2, h, tokens, d] of some KV heads."""
    fmt, counts = store.format, store.table.rows[b].counts
    all_heads = heads.stop - heads.start == fmt.kv_heads
    most = (
        len(counts) if all_heads else pages_at_a_time(fmt.kv_heads, fmt.head_dim, fmt.page_size, room.dtype)
    )
    step = even(len(counts), min(most, STAGED_PAGES) if store.pool.offloading else most)
    start, done = torch.zeros(1, dtype=torch.int32, device=room.device), 0
    for first in range(0, len(counts), step):
        last = done + sum(counts[first : first + step])
        target = room[:, :, done:last]
        # Pages are decoded for all heads.
        found = target if all_heads else room.new_empty(2, fmt.kv_heads, last - done, fmt.head_dim)
        decode(store, slice(b, b + 1), slice(first, first + step), start, found[0], found[1])
        if not all_heads:
            target.copy_(found[:, heads])
        done = last
