"""One layer of the cache: what transformers calls while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

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

    def __repr__(self) -> str:
        if self.store is None or not self.columns:
            return f"{type(self).__name__}({self.layer_idx}, empty)"
        encoded = sum(self.store.encoded(b) for b in range(self.store.batch))
        return (
            f"{type(self).__name__}({self.layer_idx}, rows={self.store.batch}, tokens={self.columns}, "
            f"encoded={encoded}, {self.store.memory().total / 2**20:.2f} MiB)"
        )

    def __copy__(self) -> NoReturn:
        raise StateError("a layer is a part of its cache and has no copy of its own; copy the cache")

    @property
    def is_initialized(self) -> bool:
        """Whether tokens are held."""
        return self.columns > 0

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Ignored: transformers sets it at times that are not ours, what is held decides."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.store = LayerStore(self._cache.config, key_states, self._balance)

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
            self._check_state(key_states.shape[2])
            if not self.columns:
                # Also after a first step that failed.
                self.lazy_initialization(key_states, value_states)
            self._pending = NewKeys(self, key_states, value_states)
            return self._pending, value_states

    def _check_state(self, new: int) -> None:
        """Once a step: refuse a model that is in another state than when the cache was filled."""
        if self is self._cache.compressed_layers[0]:
            if self.columns:
                self._cache.state.check(thorough=new > 1)
            else:
                self._cache.state.remember()

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
        # Models ask before their layers run: here nothing has been computed yet.
        if self.columns and not torch.compiler.is_compiling():
            self._check_state(query_length)
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.store, self._pending, self.columns, self.read = None, None, 0, []

    def offload(self) -> None:
        raise StateError(
            "transformers' offloading of whole layers does not fit this cache; make it with "
            "SelfIndexCache(model, offloading=True) to keep most of it in host memory"
        )

    def prefetch(self) -> None:
        self.offload()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> NoReturn:
        raise StateError("rows change place in all layers at once: call the cache's reorder_cache")
