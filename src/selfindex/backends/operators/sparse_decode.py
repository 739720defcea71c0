"""`sparse_decode`: score, select and attend in one."""

from __future__ import annotations

from torch import Tensor

from ...codec import PageFormat
from ...index.select import sum_of_softmax
from .define import define, fake_part
from .score import score
from .select import select
from .sparse_attend import sparse_attend


def sparse_decode(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    budgets: Tensor,
    width: int,
    constants: Tensor,
    scaling: float,
    format: str,
    recent: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score every token from the index, select `budgets` of them a row, attend to those.

    Args:
        budgets: int32 [B], tokens that a row reads; width: most of them.
        recent: what a backend keeps at hand of an offloaded payload plane, see `cuda.recent`; written to.
            It changes no result.
    Returns:
        (output [B, Hq, T, d], log-sum-exp [B, Hq, T]), float32.
    """
    fmt = PageFormat.parse(format)
    if fmt.preset == "paper":
        # The paper scores the mean query of the GQA group.
        mean = query.float().unflatten(1, (fmt.kv_heads, -1)).mean(2)
        scores = score(mean, index_pool, block_table, page_counts, constants, scaling, format)
    else:
        logits = score(query, index_pool, block_table, page_counts, constants, scaling, format)
        scores = sum_of_softmax(logits, fmt.kv_heads)
    slots = select(scores, budgets, width)
    return sparse_attend(query, index_pool, payload_pool, block_table, slots, constants, scaling, format)


operator = define(sparse_decode, fake_part, ("recent",))
