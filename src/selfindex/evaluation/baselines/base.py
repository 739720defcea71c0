"""One interface for other KV caches: what they store of a prefix, and what a query reads of it.

A method sees the keys and values of a whole prefix of one layer and returns `Stored`. Attention
over it, new tokens, and everything around (model, text, metrics) is the same for all methods.
Every method keeps the same full-precision tokens at both ends, unless its publication says what
it keeps; `budget` counts the tokens read in addition to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cache_layers import ReplacedCache
from ..recording import Recording

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
    """A KV cache."""

    def store(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Stored:
        """Take a prefix: query [Hq, n, d], keys, values [H, n, d], float32."""

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
    """

    def __init__(self, method: Method, stored: Stored) -> None:
        self.method, self.stored = method, stored
        self.new_keys = self.new_values = stored.keys[:, :0]

    def visible(self, grouped: Tensor, scaling: float) -> Tensor | None:
        """Tokens that queries [H, G, T, d] attend to: bool [H, T or 1, n], or None for all."""
        stored = self.stored
        visible = self.method.select(stored, grouped, scaling)
        if visible is not None:
            visible = visible | stored.exact.to(visible.device)
        if stored.kept is not None:
            kept = stored.kept[:, None]
            visible = kept if visible is None else visible & kept
        return visible

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Attention of new tokens, query [B, Hq, T, d] and keys, values [B, H, T, d]: [B, T, Hq, d]."""
        self.new_keys = torch.cat((self.new_keys, keys.float().flatten(0, 1)), 1)
        self.new_values = torch.cat((self.new_values, values.float().flatten(0, 1)), 1)
        stored, (batch, heads) = self.stored, keys.shape[:2]
        grouped = query.float().unflatten(1, (heads, -1)).flatten(0, 1)  # [B H, G, T, d]
        visible = self.visible(grouped, scaling)
        logits = grouped @ stored.keys[:, None].transpose(-1, -2) * scaling
        if visible is not None:
            logits = logits.masked_fill(~visible[:, None], -torch.inf)
        own = grouped @ self.new_keys[:, None].transpose(-1, -2) * scaling
        t, total = query.shape[2], self.new_keys.shape[1]
        causal = torch.ones(t, total, dtype=torch.bool, device=query.device).tril(total - t)
        weights = torch.cat((logits, own.masked_fill(~causal, -torch.inf)), -1).softmax(-1)
        n = stored.keys.shape[1]
        out = weights[..., :n] @ stored.values[:, None] + weights[..., n:] @ self.new_values[:, None]
        return out.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2).to(query.dtype)


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


def baseline_cache(model: Any, recording: Recording, method: Method) -> ReplacedCache:
    """A cache whose full-attention layers are `method`, filled with recorded prefixes."""
    attentions: dict[int, Baseline] = {}
    for i, (query, keys, values, scaling) in zip(recording.layers, recording.tensors, strict=True):
        rows = [
            method.store(q.float(), k.float(), v.float(), scaling)
            for q, k, v in zip(query, keys, values, strict=True)
        ]
        attentions[i] = Baseline(method, join(rows))
    return ReplacedCache(model, attentions, recording.dense)
