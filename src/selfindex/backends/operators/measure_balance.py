"""`measure_balance`: what the first queries and keys of rows make of their balance."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codec import measure_balance as balance_of
from .define import define


def _fake(query: Tensor, keys: Tensor, query_square: Tensor, queries: int) -> Tensor:
    return query_square.new_empty(query_square.shape)


def square_of(query: Tensor, kv_heads: int) -> Tensor:
    """Squares of queries [B, Hq, T, d], mean over the query heads of a KV head: float32 [B, H, T, d]."""
    return query.float().square().unflatten(1, (kv_heads, -1)).mean(2)


def measure_balance(query: Tensor, keys: Tensor, query_square: Tensor, queries: int) -> Tensor:
    """Measure the balance of every row from its own tokens; see `codec.measure_balance`.

    A row's result does not depend on the others, to the last bit.

    Args:
        query: [B, Hq, T, d], the last of the observed queries, T may be 0; channels side by side.
        keys: [B, H, N, d], the first page of each row.
        query_square: float32 [B, H, d], sum over the queries before of `square_of`.
        queries: how many tokens there are in all of a row, these included.
    Returns:
        float32 [B, H, d].
    """
    rows = []
    for own, page, before in zip(query, keys, query_square, strict=True):
        # A batch of one, whatever is around it: sums are added up in the same order.
        square = before + square_of(own[None].contiguous(), keys.shape[1]).sum((0, 2))
        rows.append(balance_of(page[None].contiguous(), square / max(1, queries)))
    return torch.stack(rows)


operator = define(measure_balance, _fake)
