"""One dense prefill whose queries, keys and values fill any number of caches.

Prefill attention is exact in every variant, so what they store differs only in its encoding; but for those
that ask for the same documents `again`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..config import SelfIndexConfig
from ..integrations.transformers import SelfIndexCache
from ..integrations.transformers.observer import Observation
from .cache_layers import observe_dense

SAMPLED_QUERIES = 2048
"""Queries of a layer that are enough for every method: the first and last quarter of them are a prompt's
first and last ones, which some look at, and the rest are spread evenly over it.
"""


PASS_TOKENS = 1 << 15
"""Tokens that are read in one pass over some of the documents, or one document if it has more."""


@dataclass
class Recording:
    """What a prefill left behind. Keys and values are those of the dense cache, and in no other place.

    Attributes:
        queries: per compressed layer [B, Hq, M, d]: all N, or those of `sampled`.
        scalings: per compressed layer.
        dense: the dense cache of the N tokens.
        layers: indices of the compressed layers.
        ids: [B, N] of the tokens.
        following: int64 [B] on the host, the most likely next token.
    """

    queries: list[Tensor]
    scalings: list[float]
    dense: DynamicCache
    layers: list[int]
    ids: Tensor
    following: Tensor

    @property
    def tensors(self) -> list[tuple[Tensor, Tensor, Tensor, float]]:
        """Per compressed layer (query [B, Hq, M, d], keys, values [B, H, N, d], scaling)."""
        held: list[Any] = [self.dense.layers[i] for i in self.layers]
        return [
            (query, layer.keys, layer.values, scaling)
            for query, layer, scaling in zip(self.queries, held, self.scalings, strict=True)
        ]

    def fill(self, cache: SelfIndexCache) -> SelfIndexCache:
        """Store the recorded tokens in an empty cache of the same model."""
        for layer, (query, keys, values, scaling) in zip(cache.compressed_layers, self.tensors, strict=True):
            layer.commit(query, keys, values, None, scaling)
        copy_other_layers(self.dense, cache)
        return cache

    def dense_copy(self) -> DynamicCache:
        """A dense cache to continue from, independent of the recording."""
        return copy.deepcopy(self.dense)

    def rows(self, first: int, end: int) -> Recording:
        """The recording of some rows of the batch, which shares this one's memory."""
        dense = copy.copy(self.dense)
        held: list[Any] = self.dense.layers
        dense.layers = [_with(layer, layer.keys[first:end], layer.values[first:end]) for layer in held]
        queries = [x[first:end] for x in self.queries]
        own = self.ids[first:end], self.following[first:end]
        return Recording(queries, self.scalings, dense, self.layers, *own)

    def again(self, model: Any, config: SelfIndexConfig) -> Recording:
        """The same tokens read anew, as `config.prefill` says; of their queries, some."""
        return read(model, self.ids, config)


def _with(layer: Any, keys: Tensor, values: Tensor) -> Any:
    """A dense cache's layer with other content."""
    new = copy.copy(layer)
    new.keys, new.values = keys, values
    return new


def joined(parts: Sequence[Recording]) -> Recording:
    """Recordings of prompts of equal length as one; `parts` lose what they hold, a layer at a time."""
    if len(parts) == 1:
        return parts[0]
    dense, layers = copy.copy(parts[0].dense), list[Any]()
    for i in range(len(dense.layers)):
        own: list[Any] = [part.dense.layers[i] for part in parts]
        layers.append(_with(own[0], torch.cat([x.keys for x in own]), torch.cat([x.values for x in own])))
        for x in own:
            x.keys = x.values = x.keys.new_empty(0)  # a view would hold on to the memory
    dense.layers = layers
    queries = [torch.cat([part.queries[i] for part in parts]) for i in range(len(parts[0].queries))]
    ids, following = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "following"))
    return Recording(queries, parts[0].scalings, dense, parts[0].layers, ids, following)


def copy_other_layers(dense: DynamicCache, cache: SelfIndexCache) -> None:
    """Give a cache what a dense one holds in layers that are not compressed, as with a sliding window."""
    compressed = {layer.layer_idx for layer in cache.compressed_layers}
    layers: list[Any] = dense.layers
    for i, layer in enumerate(layers):
        if i not in compressed:
            cache.layers[i] = copy.deepcopy(layer)


def sampled(queries: Tensor) -> Tensor:
    """At most SAMPLED_QUERIES of queries [B, Hq, N, d], in order."""
    n, quarter = queries.shape[2], SAMPLED_QUERIES // 4
    if n <= SAMPLED_QUERIES:
        return queries
    inner = torch.linspace(quarter, n - quarter - 1, SAMPLED_QUERIES - 2 * quarter).long()
    at = torch.cat((torch.arange(quarter), inner, torch.arange(n - quarter, n)))
    return queries[:, :, at.to(queries.device)]


@torch.inference_mode()
def record(
    model: Any, ids: Tensor, all_queries: bool = True, config: SelfIndexConfig | None = None
) -> Recording:
    """Run a dense prefill of token ids [B, N] and keep what its full-attention layers saw.

    Args:
        all_queries: else `sampled`, which takes far less memory where prompts are long.
        config: whose `prefill` says how prompts attend; exactly without one.
    """
    dense, found = DynamicCache(config=model.config), dict[int, tuple[Tensor, float]]()

    def keep(seen: Observation) -> None:
        query = seen.query if all_queries else sampled(seen.query)
        found[seen.layer.layer_idx] = (query, seen.scaling)

    following = observe_dense(model, dense, ids, keep, config, logits_to_keep=1).logits[:, -1].argmax(-1)
    queries, scalings = zip(*found.values(), strict=True)
    return Recording(list(queries), list(scalings), dense, list(found), ids, following.cpu())


def read(model: Any, ids: Tensor, config: SelfIndexConfig | None = None) -> Recording:
    """`record` documents [B, N], some at a time, with some of their queries."""
    rows = max(1, PASS_TOKENS // ids.shape[1])
    return joined([record(model, part.to(model.device), False, config) for part in ids.split(rows)])
