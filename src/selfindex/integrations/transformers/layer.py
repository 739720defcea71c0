"""One layer of the cache: what transformers calls while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from ...attention.attend import attend
from ...errors import StateError
from ...store import LayerStore
from .attention import NewKeys
from .guard import check_order
from .inputs import check_new_tokens, check_query

if TYPE_CHECKING:
    from .cache import SelfIndexCache


class SelfIndexLayer(CacheLayerMixin):
    """One compressed attention layer of a `SelfIndexCache`."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: SelfIndexCache, layer_idx: int, balance: Tensor | None) -> None:
        super().__init__()
        self._cache = weakref.proxy(cache)
        self.layer_idx = layer_idx
        self._balance = balance
        self.store: LayerStore | None = None
        self.columns = 0
        self.read: list[int] = []
        self._pending: NewKeys | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.store = LayerStore(self._cache.config, key_states, self._balance)
        self.is_initialized = True

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """Accept new keys and values [B, H, T, d]; they are stored once attention has run.

        Raises:
            InputError: wrong shape, dtype, device, batch size, or content.
            StateError: layers were called out of order.
        """
        with self._cache.guard.use():
            held = self.store.raw.keys if self.store is not None and self.columns else None
            check_new_tokens(key_states, value_states, held, self.layer_idx)
            check_order(self._cache, self, key_states.shape[2])
            if not self.columns:
                # Also after a first step that failed.
                self.lazy_initialization(key_states, value_states)
            self._pending = NewKeys(self, key_states, value_states)
            return self._pending, value_states

    @torch.compiler.disable
    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        new: NewKeys,
        mask: Tensor | None,
        scaling: float,
        sink_logit: Tensor | None,
        dense: Callable[..., tuple[Tensor, Any]],
    ) -> Tensor:
        """Attend, then store the new tokens. Returns [B, T, Hq, d]; see `attention_forward`."""
        cache = self._cache
        cache.check_module(module)
        with cache.guard.use():
            if new is not self._pending or self.store is None:
                raise StateError(
                    f"layer {self.layer_idx}: attention ran twice, or on keys of an earlier step"
                )
            keys, values, store = new.new_keys, new.new_values, self.store
            check_query(query, keys)
            valid = cache.step_columns(self, mask, keys.shape[2])
            if valid is not None:
                valid = valid.to(keys.device)  # with device_map, layers are on several devices
            encoded = any(store.encoded(b) for b in range(store.batch))
            if self.columns == 0:
                # Prefill is the model's own attention on its own tensors.
                output = dense(query, keys, values, mask)[0]
            elif not encoded and cache.columns is None and valid is None:
                held_k, held_v, _ = store.raw.held()
                output = dense(query, torch.cat((held_k, keys), 2), torch.cat((held_v, values), 2), mask)[0]
            else:
                output, self.read = attend(
                    store, query, keys, values, valid, scaling, sink_logit, cache.integers
                )
                output = output.transpose(1, 2).contiguous()
            self.commit(query, keys, values, valid, scaling)
            return output

    def commit(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float
    ) -> None:
        """Store tokens that attention has run for; arguments as `LayerStore.append`."""
        if self.store is None:
            self.lazy_initialization(keys, values)
        assert self.store is not None
        change = self.store.plan(keys, values, query, valid, scaling)
        with self._cache.guard.change():
            self.store.commit(change)
            self.columns += keys.shape[2]
            self._cache.keep_columns(self)
        self._pending = None

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included, as transformers counts."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.store, self._pending, self.columns, self.read = None, None, 0, []
        self.is_initialized = False

    def offload(self) -> None:
        raise StateError(
            "transformers' offloading of whole layers does not fit this cache; make it with "
            "SelfIndexCache(model, offloading=True) to keep most of it in host memory"
        )

    def prefetch(self) -> None:
        self.offload()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> NoReturn:
        raise StateError("rows change place in all layers at once: call the cache's reorder_cache")


class LinearAndSelfIndexLayer(LinearAttentionLayer, SelfIndexLayer):  # type: ignore[override]
    """A compressed attention layer whose block has a linear-attention state as well, as in Falcon-H1.

    The state is kept as transformers keeps it.
    """

    is_compileable = False

    def __init__(
        self, cache: SelfIndexCache, layer_idx: int, balance: Tensor | None, number_of_states: int
    ) -> None:
        SelfIndexLayer.__init__(self, cache, layer_idx, balance)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of attention with keys and values, by position; of a state with its name, as transformers does."""
        kind = SelfIndexLayer if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        SelfIndexLayer.reset(self)

    def offload(self) -> None:
        SelfIndexLayer.offload(self)

    def prefetch(self) -> None:
        SelfIndexLayer.prefetch(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> NoReturn:
        SelfIndexLayer.reorder_cache(self, beam_idx)
