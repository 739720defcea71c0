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
        return self.around(cache)

    def around(self, cache: SelfIndexCache) -> SelfIndexCache:
        """Fill only the layers that the cache does not compress (sliding windows)."""
        for i, layer in enumerate(self.dense.layers):
            if i not in {x.layer_idx for x in cache.compressed_layers}:
                cache.layers[i] = copy.deepcopy(layer)
        return cache

    def dense_copy(self) -> DynamicCache:
        """A dense cache to continue from, independent of the recording."""
        return copy.deepcopy(self.dense)


@torch.inference_mode()
def record(model: Any, ids: Tensor) -> Recording:
    """Run a dense prefill of token ids [B, N] and keep what its full-attention layers saw."""
    cache = SelfIndexCache(model)
    dense = DynamicCache(config=model.config)
    tensors: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def keep(layer: Any) -> Any:
        def attend(
            module: Any, query: Tensor, new: Any, mask: Any, scaling: float, sinks: Any, run: Any
        ) -> Tensor:
            tensors.append((query, new.new_keys, new.new_values, scaling))
            dense.layers[layer.layer_idx].update(new.new_keys, new.new_values)
            layer.columns += query.shape[2]
            return run(query, new.new_keys, new.new_values, mask)[0]

        return attend

    for layer in cache.compressed_layers:
        layer.attend = keep(layer)  # type: ignore[method-assign]
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    compressed = {layer.layer_idx for layer in cache.compressed_layers}
    for i, other in enumerate(cache.layers):
        if i not in compressed:
            dense.layers[i] = other
    return Recording(tensors, dense, logits, sorted(compressed))
