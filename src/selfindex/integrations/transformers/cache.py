"""`SelfIndexCache`: the KV cache users hand to a transformers model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ...attention.attend import attend
from ...codec import BalanceProfile
from ...codec.rotation import HEAD_DIMS
from ...config import SelfIndexConfig, check_budget
from ...errors import InputError, StateError
from ...report import LayerReport, Report
from ...store import LayerStore
from .attention import NewKeys, prepare
from .masks import new_columns
from .models import plan_layers
from .saving import load, read_options, save


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
        if key_states.shape[-1] not in HEAD_DIMS:
            raise InputError(f"head_dim {key_states.shape[-1]} is not supported; supported are {HEAD_DIMS}")
        self.store = LayerStore(self._cache.config, key_states, self._balance)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """Accept new keys and values [B, H, T, d]; they are stored once attention has run.

        Raises:
            InputError: wrong shape, dtype, device, batch size, or content.
            StateError: layers were called out of order.
        """
        self._check(key_states, value_states)
        self._cache.check_order(self, key_states.shape[2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._pending = NewKeys(self, key_states, value_states)
        return self._pending, value_states

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if keys.ndim != 4 or keys.shape != values.shape:
            raise InputError(
                "keys and values must both be [batch, heads, tokens, head_dim]; got "
                f"{tuple(keys.shape)} and {tuple(values.shape)}"
            )
        if keys.dtype not in (torch.float32, torch.float16, torch.bfloat16) or keys.dtype != values.dtype:
            raise InputError(
                f"keys and values must share a dtype out of float32, float16, bfloat16; "
                f"got {keys.dtype}, {values.dtype}"
            )
        if self.store is not None:
            self._check_fit(keys, self.store.raw.keys)
        if keys.shape[2] > 1 and not bool(torch.isfinite(keys).all() & torch.isfinite(values).all()):
            raise InputError(
                f"layer {self.layer_idx}: keys or values hold NaN or infinity. Check the model's dtype "
                "(fp16 overflows in some models; use bf16) and its inputs"
            )

    @staticmethod
    def _check_fit(keys: Tensor, held: Tensor) -> None:
        if keys.shape[0] != held.shape[0]:
            raise InputError(
                f"the cache holds a batch of {held.shape[0]}, got {keys.shape[0]}; use one cache per "
                "batch, or batch_select_indices / batch_repeat_interleave to change it"
            )
        for what in ("dtype", "device"):
            if getattr(keys, what) != getattr(held, what):
                raise InputError(f"the cache holds {what} {getattr(held, what)}, got {getattr(keys, what)}")
        if keys.shape[1::2] != held.shape[1::2]:
            raise InputError(
                f"the cache holds {held.shape[1]} heads of {held.shape[3]}, "
                f"got {keys.shape[1]} of {keys.shape[3]}"
            )

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
        self._cache.check_module(module)
        if new is not self._pending or self.store is None:
            raise StateError(f"layer {self.layer_idx}: attention ran twice, or on keys of an earlier step")
        keys, values, store = new.new_keys, new.new_values, self.store
        valid = self._cache.step_columns(self, mask, keys.shape[2])
        encoded = any(store.encoded(b) for b in range(store.batch))
        if self.columns == 0:
            # Prefill is the model's own attention on its own tensors.
            output = dense(query, keys, values, mask)[0]
        elif not encoded and self._cache.columns is None:
            held_k, held_v, _ = store.raw.held()
            output = dense(query, torch.cat((held_k, keys), 2), torch.cat((held_v, values), 2), mask)[0]
        else:
            output, self.read = attend(store, query, keys, values, valid, scaling, sink_logit)
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
        self.store.append(keys, values, query, valid, scaling)
        self.columns += keys.shape[2]
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

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx)

    def select_rows(self, rows: Tensor) -> None:
        """Make row i a copy of old row rows[i]; encoded pages are shared."""
        if self.store is not None:
            self.store.select_rows(rows)


def _with_padding(columns: Tensor | None) -> Tensor | None:
    """`SelfIndexCache.columns` after some were dropped: None if no padding is left."""
    return None if columns is None or bool(columns.all()) else columns


class SelfIndexCache(Cache):
    """A KV cache for transformers models whose keys are their own index.

    Pass it as `past_key_values` (or `cache`, from transformers 5.24 on) to `generate` or to the
    model. The model is prepared on construction: it switches to an attention function that
    understands this cache and behaves as before with any other.

    Args:
        model: a transformers decoder of a supported family.
        config: a `SelfIndexConfig`; `options` override its fields.
        options: fields of `SelfIndexConfig`, such as `budget=0.05` or `preset="paper"`.

    Raises:
        ConfigError: an option is out of range.
        UnsupportedModelError: the model's attention cannot be represented.
        FormatError: the profile cannot be read.
    """

    def __init__(self, model: PreTrainedModel, config: SelfIndexConfig | None = None, **options: Any) -> None:
        self.config = SelfIndexConfig.make(config, **options)
        dense, full = plan_layers(model, self.config)
        balance: dict[int, Tensor] = {}
        if self.config.profile is not None:
            balance = BalanceProfile.load(self.config.profile).balance
            missing = [i for i in full if i not in balance]
            if missing:
                raise InputError(f"the profile {self.config.profile} lacks layers {missing} of this model")
        prepare(model)
        self._compressed = [SelfIndexLayer(self, i, balance.get(i)) for i in full]
        layers: list[Any] = list(dense.layers)
        for layer in self._compressed:
            layers[layer.layer_idx] = layer
        super().__init__(layers=layers)
        self._modules = weakref.WeakSet(model.modules())
        self.columns: Tensor | None = None
        """bool [B, columns] of real tokens; None while there was no padding."""
        self._step: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SelfIndexCache:
        """Copy what is stored, for two continuations of one prompt; the model stays the same."""
        new = type(self).__new__(type(self))
        memo |= {id(self): new, id(self._modules): self._modules}
        for layer in self._compressed:
            memo[id(layer._cache)] = weakref.proxy(new)
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    @property
    def compressed_layers(self) -> list[SelfIndexLayer]:
        """The layers this cache compresses, in order."""
        return self._compressed

    def set_budget(self, budget: float | int) -> None:
        """Change the budget of the steps to come; what is stored stays as it is.

        Raises:
            ConfigError: the budget is out of range.
        """
        check_budget(budget)
        self.config = SelfIndexConfig.make(self.config, budget=budget)
        for layer in self._compressed:
            if layer.store is not None:
                layer.store.config = self.config

    def check_module(self, module: nn.Module) -> None:
        """Raise StateError if an attention module of another model uses this cache."""
        if module not in self._modules:
            raise StateError("this cache was built for another model; build one with SelfIndexCache(model)")

    def check_order(self, layer: SelfIndexLayer, new: int) -> None:
        """Raise StateError unless the layers before this one have just taken the same tokens."""
        position = self._compressed.index(layer)
        before = self._compressed[position - 1]
        expected = layer.columns if position == 0 else layer.columns + new
        if before.columns != expected:
            common = min(x.columns for x in self._compressed)
            raise StateError(
                f"layer {layer.layer_idx} got {new} tokens on top of {layer.columns}, while layer "
                f"{before.layer_idx} holds {before.columns}: a forward pass was interrupted or layers were "
                f"called out of order. cache.crop({common}) returns to the last complete step, cache.reset() "
                "empties the cache"
            )

    def step_columns(self, layer: SelfIndexLayer, mask: Tensor | None, new: int) -> Tensor | None:
        """Which new columns hold tokens, bool [B, T] or None for all; read once per forward pass."""
        if layer is self._compressed[0] and layer.store is not None:
            batch, past, device = layer.store.batch, layer.columns, layer.store.raw.keys.device
            self._step = new_columns(mask, self.columns, past, new, batch)
            if self._step is not None or self.columns is not None:
                ones = torch.ones(batch, past + new, dtype=torch.bool, device=device)
                old = ones[:, :past] if self.columns is None else self.columns
                self.columns = torch.cat((old, ones[:, past:] if self._step is None else self._step), 1)
        return self._step

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens.

        Args:
            tokens_to_remove: negative: this many columns from the end, as transformers calls it.
                Positive: keep this many, as it did before 5.18. 0 removes nothing.

        Raises:
            StateError: the paper preset would have to cut inside its prompt.
        """
        common = min(layer.columns for layer in self._compressed)
        amount = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        keep = max(0, min(amount if amount > 0 else common + amount, common))
        if keep == 0:
            self.reset()
            return
        columns = None if self.columns is None else self.columns[:, :keep]
        stores = [layer.store for layer in self._compressed if layer.store is not None]
        lengths: list[int] = [keep] * stores[0].batch if columns is None else columns.sum(1).tolist()
        layers = cast(list[Any], self.layers)
        others = [x for x in layers if not isinstance(x, SelfIndexLayer) and x.is_initialized]
        # Refuse before anything is changed.
        for store in stores:
            store.check_crop(lengths)
        for layer in others:
            past = layer.get_seq_length()
            full = getattr(layer, "is_sliding", False) and layer.sliding_window <= past
            if full and keep < past and not layer.record_past:
                raise StateError(
                    "a sliding-window layer has dropped the tokens it would need after crop; call "
                    "cache.activate_past_recording() before the tokens that may go, or reset the cache"
                )
        for layer in others:
            surplus = max(0, layer.get_seq_length() - keep)
            if surplus or getattr(layer, "record_past", False):
                layer.crop(-surplus)
        for compressed in self._compressed:
            if compressed.store is not None:
                compressed.store.crop(lengths)
            compressed.columns, compressed._pending = keep, None
        self.columns = _with_padding(columns)

    def reset(self) -> None:
        super().reset()
        for layer in cast(list[Any], self.layers):
            # Otherwise transformers 5.17 keeps their old tokens, as zeros.
            layer.is_initialized = False
        self.columns = self._step = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.columns is not None:
            self.columns = _with_padding(self.columns[beam_idx.to(self.columns.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch, in this order."""
        rows = torch.as_tensor(indices)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        for layer in cast(list[Any], self.layers):
            if isinstance(layer, SelfIndexLayer):
                layer.select_rows(rows)
            elif layer.is_initialized:
                layer.batch_select_indices(rows)
        if self.columns is not None:
            self.columns = _with_padding(self.columns[rows.to(self.columns.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; encoded pages are shared between the copies."""
        for layer in cast(list[Any], self.layers):
            if isinstance(layer, SelfIndexLayer):
                if layer.store is not None:
                    layer.select_rows(torch.arange(layer.store.batch).repeat_interleave(repeats))
            elif layer.is_initialized:
                layer.batch_repeat_interleave(repeats)
        if self.columns is not None:
            self.columns = self.columns.repeat_interleave(repeats, 0)

    def profile(self) -> BalanceProfile:
        """The balance this cache measured, to be saved and passed as `profile=` later.

        Raises:
            StateError: nothing was encoded yet, or the preset has no balance.
        """
        balance = {}
        for layer in self._compressed:
            if self.config.preset != "balanced" or layer.store is None or layer.store.constants is None:
                raise StateError(
                    "no balance yet: the balanced preset measures it when it encodes its first page"
                )
            balance[layer.layer_idx] = layer.store.constants[0]
        return BalanceProfile(balance)

    def save(self, model: PreTrainedModel, path: str | Path) -> None:
        """Write what the cache holds to a safetensors file, to go on from it in another process.

        Raises:
            StateError: the cache is empty, or the model has sliding-window layers.
            OSError: the file cannot be written; an older file of that name is untouched then.
        """
        self.check_module(next(iter(model.modules())))
        save(self, model, path)

    @classmethod
    def load(cls, model: PreTrainedModel, path: str | Path, offloading: bool | None = None) -> SelfIndexCache:
        """A cache as `save` left it, with the options it had; None keeps `offloading` as well.

        `batch_repeat_interleave(n)` then gives n requests the same prefix; its pages are shared.

        Raises:
            FormatError: the file is missing, damaged, newer, or of another model or dtype.
        """
        options = {} if offloading is None else {"offloading": offloading}
        cache = cls(model, read_options(path, model), **options)
        load(cache, model, path)
        return cache

    def report(self) -> Report:
        """Memory by kind, ratio to 16-bit keys and values, tokens read by the last step."""
        return Report(
            preset=self.config.preset,
            layers=[
                LayerReport.of(layer.layer_idx, layer.store, layer.read)
                for layer in self._compressed
                if layer.store is not None
            ],
        )
