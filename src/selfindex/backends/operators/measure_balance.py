"""`measure_balance`: what the first queries and keys of a layer make of its balance."""

from __future__ import annotations

from torch import Tensor

from ...codec import measure_balance as balance_of
from .define import define


def _fake(query: Tensor, keys: Tensor, query_square: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    return query_square.new_empty(query_square.shape), query_square.new_empty(query_square.shape)


def square_of(query: Tensor, kv_heads: int) -> Tensor:
    """Squares of queries [B, Hq, T, d], mean over the query heads of a KV head: float32 [B, H, T, d]."""
    return query.float().square().unflatten(1, (kv_heads, -1)).mean(2)


def measure_balance(query: Tensor, keys: Tensor, query_square: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Add up squares of queries and measure the balance; see `codec.measure_balance`.

    Args:
        query: [B, Hq, T, d], the last of the observed queries, T may be 0; channels side by side.
        keys: [n, H, N, d], the first pages.
        query_square: float32 [H, d], sum over the queries before of `square_of`.
        queries: how many tokens there are in all, these included.
    Returns:
        (query_square with these queries, balance), float32 [H, d] each.
    """
    square = query_square + square_of(query, keys.shape[1]).sum((0, 2))
    return square, balance_of(keys, square / max(1, queries))


operator = define(measure_balance, _fake)
