"""One interface for other KV caches: what they store of a prefix, and what a query reads of it.

A method sees the keys and values of a whole prefix of one layer and returns `Stored`. Attention
over it, new tokens, and everything around (model, text, metrics) is the same for all methods.
Every method keeps the same full-precision tokens at both ends, unless its publication says what
it keeps; `budget` counts the tokens read in addition to them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ...config import EVERY_QUERY
from ..cache_layers import ReplacedCache
from ..recording import Recording

LOGITS = 1 << 27
"""Logits of a layer that are held at a time."""

SINKS, RECENT = 16, 64
"""Full-precision tokens at both ends, as selfindex keeps them by default."""


@dataclass
class Stored:
    """What a method holds of one layer's prefix of n tokens.

    Attributes:
        keys, values: [H, n, d] as they decode; evicted tokens are masked by `kept`.
        exact: bool [n], tokens that every query attends to in full precision.
        kept: bool [H, n] of tokens that still exist, or None for all.
        index: whatever `Method.select` needs.
    """

    keys: Tensor
    values: Tensor
    exact: Tensor
    kept: Tensor | None = None
    index: Any = None


class Method(Protocol):
    """A KV cache.

    Attributes:
        selects: whether queries read some of what is stored, so that it matters which of them select.
    """

    selects: ClassVar[bool]

    def store(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Stored:
        """Take a prefix: keys, values [H, n, d], and of its queries some [Hq, m, d], float32.

        The last 32 queries at least are the prefix's last.
        """

    def select(self, stored: Stored, query: Tensor, scaling: float) -> Tensor | None:
        """Tokens that queries [H, G, T, d] read: bool [H, T, n], or None for all."""

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes per cached token and KV head, scales and index included; 4 d is 16-bit."""

    def bytes_read(self, head_dim: int) -> float:
        """Bytes that a decode step reads, per cached token and KV head."""


def full_precision(tokens: int, sinks: int = SINKS, recent: int = RECENT) -> Tensor:
    """Bool [tokens], True for those kept in full precision: the first `sinks` and the last `recent`."""
    at = torch.arange(tokens)
    return (at < sinks) | (at >= tokens - recent)


def top_tokens(score: Tensor, count: int, exact: Tensor) -> Tensor:
    """The `count` best tokens of score [..., n] that are not `exact` anyway: bool [..., n]."""
    score = score.masked_fill(exact, -torch.inf)
    chosen = score.topk(min(count, score.shape[-1]), -1).indices
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen, True)
    return mask & (score > -torch.inf)


class Baseline:
    """One layer's prefix under a method, and the tokens that follow it in full precision.

    Methods treat KV heads alone, so the rows of a batch are further heads here: H counts both.

    Args:
        sparse_queries: in a pass of more tokens than this, all of them read everything that is stored.
    """

    def __init__(self, method: Method, stored: Stored, sparse_queries: int = EVERY_QUERY) -> None:
        self.method, self.stored, self.sparse_queries = method, stored, sparse_queries
        self.new_keys = self.new_values = stored.keys[:, :0]

    def visible(self, grouped: Tensor, scaling: float, select: bool = True) -> Tensor | None:
        """Tokens that queries [H, G, T, d] attend to: bool [H, T or 1, n], or None for all."""
        stored = self.stored
        visible = self.method.select(stored, grouped, scaling) if select else None
        if visible is not None:
            visible = visible | stored.exact.to(visible.device)
        if stored.kept is not None:
            kept = stored.kept[:, None]
            visible = kept if visible is None else visible & kept
        return visible

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Attention of new tokens, query [B, Hq, T, d] and keys, values [B, H, T, d]: [B, T, Hq, d]."""
        batch, heads = keys.shape[:2]
        self.new_keys = torch.cat((self.new_keys, keys.flatten(0, 1)), 1)
        self.new_values = torch.cat((self.new_values, values.flatten(0, 1)), 1)
        grouped = query.float().unflatten(1, (heads, -1)).flatten(0, 1)  # [B H, G, T, d]
        held = [torch.cat(pair, 1).float() for pair in self._pairs()]
        t, total = query.shape[2], held[0].shape[1]
        # Some queries at a time: their logits are what takes memory.
        rows = max(1, LOGITS // (grouped.shape[0] * grouped.shape[1] * total))
        out = [
            self._attend(part, held, total - t + first, scaling, t <= self.sparse_queries)
            for first, part in zip(range(0, t, rows), grouped.split(rows, 2), strict=True)
        ]
        whole = torch.cat(out, 2).unflatten(0, (batch, heads)).flatten(1, 2)
        return whole.transpose(1, 2).to(query.dtype)

    def _pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.stored.keys, self.new_keys), (self.stored.values, self.new_values)

    def _attend(self, query: Tensor, held: list[Tensor], first: int, scaling: float, select: bool) -> Tensor:
        """Of queries [B H, G, T, d] at positions from `first` on, over keys and values [B H, total, d]."""
        keys, values = held
        n = self.stored.keys.shape[1]
        visible = self.visible(query, scaling, select)
        logits = query @ keys[:, None].mT * scaling
        at = torch.arange(keys.shape[1], device=query.device)
        future = at > first + torch.arange(query.shape[2], device=query.device)[:, None]
        logits.masked_fill_(future, -torch.inf)
        if visible is not None:
            logits[..., :n].masked_fill_(~visible[:, None], -torch.inf)
        return logits.softmax(-1) @ values[:, None]


def join(rows: list[Stored]) -> Stored:
    """Prefixes of equal length as one, the rows' heads behind each other."""
    if len(rows) == 1:
        return rows[0]

    def cat(parts: list[Any]) -> Any:
        return None if parts[0] is None else torch.cat(parts)

    index = rows[0].index
    if index is not None:
        index = tuple(torch.cat(parts) for parts in zip(*(row.index for row in rows), strict=True))
    return Stored(
        cat([row.keys for row in rows]),
        cat([row.values for row in rows]),
        rows[0].exact,
        cat([row.kept for row in rows]),
        index,
    )


def baseline_cache(
    model: Any, recording: Recording, method: Method, sparse_queries: int = EVERY_QUERY
) -> ReplacedCache:
    """A cache whose full-attention layers are `method`, filled with recorded prefixes.

    What is stored decodes to the model's dtype, as what attention reads does elsewhere.
    """
    attentions: dict[int, Baseline] = {}
    for i, (query, keys, values, scaling) in zip(recording.layers, recording.tensors, strict=True):
        rows = []
        for q, k, v in zip(query, keys, values, strict=True):
            row = method.store(q.float(), k.float(), v.float(), scaling)
            rows.append(replace(row, keys=row.keys.to(k.dtype), values=row.values.to(v.dtype)))
        attentions[i] = Baseline(method, join(rows), sparse_queries)
    return ReplacedCache(model, attentions, recording.dense)
