"""One dense prefill whose queries, keys and values fill any number of caches.

Prefill attention is exact in every variant, so what they store differs only in its encoding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..integrations.transformers import SelfIndexCache
from ..integrations.transformers.observer import Observation
from .cache_layers import observe_dense


@dataclass
class Recording:
    """What a prefill left behind.

    Attributes:
        tensors: per compressed layer (query [B, Hq, N, d], keys, values [B, H, N, d], scaling).
        dense: the dense cache of the same tokens.
        logits: [B, 1, vocabulary] after the last token.
        layers: indices of the compressed layers.
    """

    tensors: list[tuple[Tensor, Tensor, Tensor, float]]
    dense: DynamicCache
    logits: Tensor
    layers: list[int]

    def fill(self, cache: SelfIndexCache) -> SelfIndexCache:
        """Store the recorded tokens in an empty cache of the same model."""
        for layer, (query, keys, values, scaling) in zip(cache.compressed_layers, self.tensors, strict=True):
            layer.commit(query, keys, values, None, scaling)
        copy_other_layers(self.dense, cache)
        return cache

    def dense_copy(self) -> DynamicCache:
        """A dense cache to continue from, independent of the recording."""
        return copy.deepcopy(self.dense)


def copy_other_layers(dense: DynamicCache, cache: SelfIndexCache) -> None:
    """Give a cache what a dense one holds in layers that are not compressed, as with a sliding window."""
    compressed = {layer.layer_idx for layer in cache.compressed_layers}
    layers: list[Any] = dense.layers
    for i, layer in enumerate(layers):
        if i not in compressed:
            cache.layers[i] = copy.deepcopy(layer)


@torch.inference_mode()
def record(model: Any, ids: Tensor) -> Recording:
    """Run a dense prefill of token ids [B, N] and keep what its full-attention layers saw."""
    dense, tensors = DynamicCache(config=model.config), dict[int, tuple[Tensor, Tensor, Tensor, float]]()

    def keep(seen: Observation) -> None:
        tensors[seen.layer.layer_idx] = (seen.query, seen.keys, seen.values, seen.scaling)

    logits = observe_dense(model, dense, ids, keep, logits_to_keep=1).logits
    return Recording(list(tensors.values()), dense, logits, list(tensors))
