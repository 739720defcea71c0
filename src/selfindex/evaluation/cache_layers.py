"""Cache layers of the evaluation: the model's own attention with an observer, and other methods'."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..attention.prompt import attend_prompt
from ..config import SelfIndexConfig
from ..integrations.transformers.attention import NewKeys
from ..integrations.transformers.models import cache_argument, plan_layers
from ..integrations.transformers.observer import Observation, Observer
from ..integrations.transformers.prepare import prepare
from ..integrations.transformers.prompt import reads_sparsely
from ..integrations.transformers.wrappers import unwrap

Run = Callable[..., tuple[Tensor, Any]]
"""The model's own attention of (query, keys, values, mask)."""


class _Layer(DynamicLayer, ABC):
    """A layer that attends itself, in models prepared for this project's cache, and can be observed."""

    def __init__(self, layer_idx: int, observer: Observer | None = None) -> None:
        super().__init__()
        self.layer_idx, self.observer = layer_idx, observer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return NewKeys(self, key_states, value_states), value_states

    def attend(
        self, module: Any, query: Tensor, new: NewKeys, mask: Any, scaling: float, sink_logit: Any, run: Run
    ) -> Tensor:
        """What `attention_forward` calls; returns [B, T, Hq, d]."""
        keys, values = new.new_keys, new.new_values
        output = self._attend(query, keys, values, mask, scaling, run)
        if self.observer is not None:
            self.observer(Observation(self, query, keys, values, scaling, output, []))
        return output

    @abstractmethod
    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Any, scaling: float, run: Run
    ) -> Tensor: ...


class _DenseLayer(_Layer):
    """Stands before a layer of a dense cache.

    Args:
        config: whose `prefill` says how prompts attend.
    """

    def __init__(
        self, layer_idx: int, plain: DynamicLayer, observer: Observer, config: SelfIndexConfig
    ) -> None:
        super().__init__(layer_idx, observer)
        self._plain, self._config = plain, config

    def attend(
        self, module: Any, query: Tensor, new: NewKeys, mask: Any, scaling: float, sink_logit: Any, run: Run
    ) -> Tensor:
        def sparse(query: Tensor, keys: Tensor, values: Tensor, mask: Any) -> tuple[Tensor, Any]:
            output = attend_prompt(self._config, query, keys, values, mask, scaling, sink_logit)
            return output.transpose(1, 2), None

        if self.get_seq_length() == 0 and reads_sparsely(self._config, mask, query.shape[2]):
            run = sparse
        return super().attend(module, query, new, mask, scaling, sink_logit, run)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Any, scaling: float, run: Run
    ) -> Tensor:
        return run(query, *self._plain.update(keys, values), mask)[0]

    def get_seq_length(self) -> int:
        return self._plain.get_seq_length()


def observe_dense(
    model: Any,
    cache: DynamicCache,
    ids: Tensor,
    observer: Observer,
    config: SelfIndexConfig | None = None,
    **options: Any,
) -> Any:
    """A forward pass of the dense model over a dense cache, its full-attention layers observed.

    Args:
        ids: [B, T], after what the cache holds.
        config: whose `prefill` says how a prompt attends to itself; exactly without one.
        options: of the forward pass.
    Returns:
        the model's output.
    """
    undo = prepare(unwrap(model))
    plain = {i: cache.layers[i] for i in full_attention_layers(model)}
    try:
        for i, layer in plain.items():
            own = _DenseLayer(i, layer, observer, config or SelfIndexConfig())  # type: ignore[arg-type]
            cache.layers[i] = own
        return model(ids, use_cache=True, **{cache_argument(model): cache}, **options)
    finally:
        for i, layer in plain.items():
            cache.layers[i] = layer
        undo()


def full_attention_layers(model: Any) -> list[int]:
    """The layers that attend to the whole context, which this project's cache compresses."""
    return plan_layers(unwrap(model), SelfIndexConfig())[1]


class Attention(Protocol):
    """Some method's attention over a prefix, which it has, and over new tokens, which it takes."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Of new tokens, query [B, Hq, T, d] and keys, values [B, H, T, d]: [B, T, Hq, d]."""


class ReplacedLayer(_Layer):
    """A layer whose attention is a method's.

    Args:
        tokens: the prefix's.
    """

    def __init__(self, layer_idx: int, attention: Attention, tokens: int) -> None:
        super().__init__(layer_idx)
        self.attention, self.tokens = attention, tokens

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Any, scaling: float, run: Run
    ) -> Tensor:
        self.tokens += query.shape[2]
        return self.attention.attend(query, keys, values, scaling)

    def get_seq_length(self) -> int:
        return self.tokens


class ReplacedCache(Cache):
    """A cache whose full-attention layers are replaced; the others are copies of a dense cache's.

    Args:
        attentions: by layer, for all that `full_attention_layers` names.
        dense: holds the prefix.
    """

    def __init__(self, model: Any, attentions: Mapping[int, Attention], dense: DynamicCache) -> None:
        prepare(unwrap(model))
        layers: list[Any] = list(dense.layers)
        for i, layer in enumerate(layers):
            own = attentions.get(i)
            layers[i] = copy.deepcopy(layer) if own is None else ReplacedLayer(i, own, layer.get_seq_length())
        self.compressed_layers: list[ReplacedLayer] = [layers[i] for i in attentions]
        super().__init__(layers=layers)
