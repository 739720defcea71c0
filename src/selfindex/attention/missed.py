"""The share of a query's attention that a step left unread, worked out afterwards from what a layer holds.

A step that selects cannot know what it missed. But the layer holds the other tokens as well: given the
step's query, the softmax over all of them costs as much as a dense step, and is worked out for whoever asks.
It comes from decoded keys; selecting anew by the index finds the tokens that the step has read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import ops
from ..backends.partial import attend_exact
from ..store import LayerStore


class Asked(NamedTuple):
    """What a step asked a layer: query [B, Hq, 1, d], factor on q.k, sink logit [Hq], see `merge_parts`."""

    query: Tensor
    scaling: float
    sink_logit: Tensor | None

    @classmethod
    def by(cls, query: Tensor, scaling: float, sink_logit: Tensor | None, reused: bool) -> Asked:
        """Keep the last of queries [B, Hq, T, d]; `reused`: their memory is written to after the step."""
        last = query.detach()
        if reused or query.shape[2] > 1:  # a view would keep all of them
            with torch.inference_mode(False):  # steps outside of it may write to the copy
                last = last[:, :, -1:].clone()
        return cls(last, scaling, None if sink_logit is None else sink_logit.detach())


@dataclass(frozen=True)
class LastStep:
    """What the last forward pass read of a layer.

    Attributes:
        read: encoded tokens that each KV head attended to, of each row.
        encoded: encoded tokens there were, of each row.
        asked: its last query; None if all was read, or a row had no token of its own in it.
        rows: rows of `asked` that are those of the layer now; None if they are the same.
    """

    read: list[int]
    encoded: list[int]
    asked: Asked | None = None
    rows: list[int] | None = None

    @property
    def unread(self) -> list[int]:
        """Tokens left out, of each row."""
        return [n - read for n, read in zip(self.encoded, self.read, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes kept for it."""
        return 0 if self.asked is None else self.asked.query.untyped_storage().nbytes()

    def select(self, rows: list[int]) -> LastStep:
        """With row i a copy of old row rows[i]."""
        read, encoded = ([x[i] for i in rows] for x in (self.read, self.encoded))
        before = self.rows
        return replace(
            self, read=read, encoded=encoded, rows=rows if before is None else [before[i] for i in rows]
        )


@torch.no_grad()
def missed_mass(store: LayerStore, last: LastStep) -> Tensor | None:
    """Share of the last query's softmax mass on tokens that the step did not read.

    Reads what a dense step reads, payload in host memory included, and changes nothing.

    Args:
        store: the layer, which holds what it held after the step.
    Returns:
        float32 [B, Hq] between 0 and 1, or [B, 1] zeros if all was read; None if that query is not known.
    """
    unread = last.unread
    if not any(unread):
        return store.window.keys.new_zeros(store.batch, 1, dtype=torch.float32)
    if last.asked is None or store.constants is None:
        return None
    query, scaling, sink_logit = last.asked
    if last.rows is not None:
        query = query[torch.tensor(last.rows, device=query.device)]
    (table, counts), device = store.table.tensors(), query.device
    pools, constants, name = (store.pool.index, store.pool.payload), store.constants, store.format.name
    # Pages that were encoded since were full-precision tokens of the step, which read them.
    pages = [_pages(row.counts, tokens) for row, tokens in zip(store.table.rows, last.encoded, strict=True)]
    then = torch.arange(table.shape[1], device=device) < torch.tensor(pages, device=device)[:, None]
    old, new = (counts.masked_fill(gone, 0) for gone in (~then, then))
    held = ops.dense_attend(query, *pools, table, old, constants, scaling, name)[1]
    budgets, most = torch.tensor(last.read, dtype=torch.int32, device=device), max(1, *last.read)
    taken = ops.sparse_decode(query, *pools, table, old, budgets, most, constants, scaling, name)[1]
    keys, values, real = store.window.held()
    visible = (
        real[:, None, None, None] if real is not None else torch.ones(1, dtype=torch.bool, device=device)
    )
    sums = [held, attend_exact(query, keys, values, visible, scaling)[1]]
    first = min(pages)
    if any(len(row.blocks) > first for row in store.table.rows):
        since = table[:, first:], new[:, first:]
        sums.append(ops.dense_attend(query, *pools, *since, constants, scaling, name)[1])
    if sink_logit is not None:
        sums.append(sink_logit.float().view(1, -1, 1).expand_as(held))
    total = torch.stack(sums).logsumexp(0)
    share = (held - total).exp() - (taken - total).exp()
    some = torch.tensor([n > 0 for n in unread], device=device)
    return torch.where(some[:, None], share[:, :, 0].clamp(0, 1), 0.0)


def _pages(counts: list[int], tokens: int) -> int:
    """Pages that hold the first `tokens` encoded tokens of a row."""
    pages = 0
    while tokens > 0:
        tokens -= counts[pages]
        pages += 1
    return pages
