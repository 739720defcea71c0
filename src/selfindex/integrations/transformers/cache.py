"""`SelfIndexCache`: the KV cache users hand to a transformers model."""

from __future__ import annotations

import copy
import operator
import weakref
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from ...attention.step import StepPlans
from ...codec import BalanceProfile
from ...config import SelfIndexConfig
from ...errors import InputError, StateError
from ...report import LayerReport, Report, held_bytes
from .adapters import ModelState
from .guard import Guard, check_sliding_crop, check_state_crop
from .inputs import check_no_weights
from .layer import LinearAndSelfIndexLayer, SelfIndexLayer
from .masks import new_columns
from .models import plan_layers
from .passes import prepare
from .replay import Replay
from .saving import load, read_header, read_options, save
from .window import SlidingWindowLayer
from .wrappers import unwrap


def _with_padding(columns: Tensor | None) -> Tensor | None:
    """`SelfIndexCache.columns` after some were dropped: None if no padding is left."""
    return None if columns is None or bool(columns.all()) else columns


def _integer(what: str, value: Any) -> int:
    """Python's form of an integer of any library, or of a tensor of one; transformers 5.17 passes these."""
    boolean = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        if not boolean:
            return operator.index(value)
    except TypeError:
        pass
    raise InputError(f"{what} one integer for all rows, got {value!r}")


class SelfIndexCache(Cache):
    """A KV cache for transformers models whose keys are their own index.

    Pass it as `past_key_values` (or `cache`, from transformers 5.24 on) to `generate` or to the
    model. The model is prepared on construction: passes with this cache run an attention function
    that understands it, all others run as before.

    Args:
        model: a transformers decoder of a supported family, or a wrapper around one (PEFT,
            torch.compile, data parallel).
        config: a `SelfIndexConfig`; `options` override its fields.
        options: fields of `SelfIndexConfig`, such as `budget=0.05` or `preset="paper"`.

    Raises:
        ConfigError: an option is out of range.
        UnsupportedModelError: the model's attention cannot be represented.
        FormatError: the profile cannot be read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: SelfIndexConfig | None = None,
        *,
        _prepare: bool = True,  # False: whoever makes the cache prepares the model, and takes it back
        **options: Any,
    ) -> None:
        model = unwrap(model)
        self.config = SelfIndexConfig.make(config, **options)
        dense, full = plan_layers(model, self.config)
        balance: dict[int, Tensor] = {}
        if self.config.profile is not None:
            balance = BalanceProfile.load(self.config.profile).balance
            missing = [i for i in full if i not in balance]
            if missing:
                raise InputError(f"the profile {self.config.profile} lacks layers {missing} of this model")
        if _prepare:
            prepare(model)
        self.plans = StepPlans()
        self.replay = Replay()
        layers: list[Any] = list(dense.layers)
        self._compressed: list[SelfIndexLayer] = []
        for i in full:
            states = getattr(layers[i], "number_of_states", None)
            if states is None:
                layers[i] = SelfIndexLayer(self, i, balance.get(i))
            else:
                layers[i] = LinearAndSelfIndexLayer(self, i, balance.get(i), states)
            self._compressed.append(layers[i])
        for i, layer in enumerate(layers):
            if type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1:
                layers[i] = SlidingWindowLayer(layer.sliding_window, self.plans)
        super().__init__(layers=layers)
        self._modules = weakref.WeakSet(model.modules())
        self.state = ModelState(model)
        self.columns: Tensor | None = None
        """bool [B, columns] of real tokens; None while there was no padding."""
        self._step: Tensor | None = None
        self._next_columns: Tensor | None = None
        self.guard = Guard()

    def __repr__(self) -> str:
        config, batch, held = self.config, self._batch(), "empty"
        if batch is not None and self._compressed[0].columns:
            size = self.report().memory.total / 2**20
            held = f"rows={batch}, tokens={self._compressed[0].columns}, {size:.2f} MiB"
        return (
            f"{type(self).__name__}(preset={config.preset!r}, budget={config.budget}, "
            f"{len(self._compressed)} of {len(self.layers)} layers compressed, {held})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError(
            "a SelfIndexCache belongs to a model of this process and cannot be pickled, nor written by "
            "torch.save; cache.save(model, path) writes it, SelfIndexCache.load(model, path) reads it"
        )

    def __copy__(self) -> SelfIndexCache:
        """A fork: two caches over the same lists and tensors would spoil each other."""
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> SelfIndexCache:
        """Copy what is stored, for a continuation that shares nothing; the model stays the same."""
        return self._copied(memo, share=False)

    def fork(self) -> SelfIndexCache:
        """Another cache that goes on from here on its own; encoded pages are shared, not copied.

        The way to serve many requests with one prefix: full-precision tokens (the sinks and the
        recent window) are copied, pages are freed when the last cache that holds them lets go.
        Each fork may run in a thread of its own, except with offloading, where one runs at a time;
        on a GPU, all of them on one CUDA stream.

        Raises:
            StateError: the cache is in use, or has to be reset.
        """
        if torch.cuda.is_initialized() and self.guard.stream is None:
            self.guard.stream = torch.cuda.current_stream().cuda_stream
        return self._copied({}, share=True)

    def _copied(self, memo: dict[int, Any], share: bool) -> SelfIndexCache:
        with self.guard.use():
            new = type(self).__new__(type(self))
            guard = self.guard.of_fork(self.config.offloading) if share else Guard()
            memo |= {id(self): new, id(self._modules): self._modules, id(self.guard): guard}
            memo |= {id(self.plans): StepPlans(), id(self.replay): Replay()}
            for layer in self._compressed:
                memo |= {id(layer._cache): weakref.proxy(new), id(layer._pending): None}
                if layer.store is not None:
                    memo[id(layer.store)] = layer.store.copied(share)
            new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
            return new

    def __iter__(self) -> NoReturn:
        raise StateError(
            "the keys and values of a SelfIndexCache cannot be listed as tensors: most are encoded. report() "
            "says what it holds, save() writes it to a file"
        )

    @property
    def is_initialized(self) -> bool:
        """Whether tokens are held."""
        return all(layer.is_initialized for layer in self._compressed)

    @property
    def compressed_layers(self) -> list[SelfIndexLayer]:
        """The layers this cache compresses, in order."""
        return self._compressed

    def update(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """What a model's attention layer calls; see `SelfIndexLayer.update`.

        Raises:
            InputError: the pass is to return attention weights.
        """
        # Before any layer has changed, one with a sliding window included.
        check_no_weights(kwargs.get("kwargs"))
        return super().update(*args, **kwargs)

    @property
    def only_compressed(self) -> bool:
        """Whether no layer holds anything but compressed keys and values."""
        return all(type(layer) is SelfIndexLayer for layer in self.layers)

    def set_budget(self, budget: float | int) -> None:
        """Change the budget of the steps to come; what is stored stays as it is.

        Raises:
            ConfigError: the budget is out of range.
        """
        config = SelfIndexConfig.make(self.config, budget=budget)
        with self.guard.change():
            self.config = config
            for layer in self._compressed:
                if layer.store is not None:
                    layer.store.config = self.config

    def check_module(self, module: nn.Module) -> None:
        """Raise StateError if an attention module of another model uses this cache."""
        if module not in self._modules:
            raise StateError("this cache was built for another model; build one with SelfIndexCache(model)")

    def step_columns(self, layer: SelfIndexLayer, mask: Tensor | None, new: int) -> Tensor | None:
        """Which new columns hold tokens, bool [B, T] or None for all; read once per forward pass."""
        if layer is self._compressed[0] and layer.store is not None:
            self.plans.begin()
            batch, past, device = layer.store.batch, layer.columns, layer.store.raw.keys.device
            self._step, kept = new_columns(mask, self.columns, past, new, batch)
            if kept is not None:
                self._hide(kept.to(device))
            self._next_columns = None
            if self._step is not None or self.columns is not None:
                ones = torch.ones(batch, past + new, dtype=torch.bool, device=device)
                old = ones[:, :past] if self.columns is None else self.columns
                self._next_columns = torch.cat((old, ones[:, past:] if self._step is None else self._step), 1)
        return self._step

    def _hide(self, kept: Tensor) -> None:
        """Let go of the last tokens of rows, such as filler after their end; their columns stay, as padding.

        In all layers, so that they agree even if the pass that brought the mask fails.

        Args:
            kept: bool [B, columns] of the tokens that stay.
        """
        lengths = kept.sum(1).tolist()
        stores = [layer.store for layer in self._compressed if layer.store is not None]
        for store in stores:
            store.check_crop(lengths)
        with self.guard.change():
            for store in stores:
                store.crop(lengths)
            self.columns = kept

    def keep_columns(self, layer: SelfIndexLayer) -> None:
        """Take over what `step_columns` read, now that the first layer holds the tokens."""
        if layer is self._compressed[0]:
            self.columns = self._next_columns

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens.

        Args:
            tokens_to_remove: an integer, or a tensor of one. Negative: this many columns from the end of
                every row, as transformers calls it; all of them empty the cache. Positive: keep this many,
                as in transformers before 5.18, which since refuses it; as many as there are, or more,
                keep all. 0 only returns from a step that was cut short to the last complete one.

        Raises:
            InputError: not an integer.
            StateError: the paper preset would have to cut inside its prompt.
        """
        amount = _integer("crop takes", tokens_to_remove)
        common = min(layer.columns for layer in self._compressed)
        keep = max(0, min(amount if amount > 0 else common + amount, common))
        with self.guard.use():
            if keep == 0:
                self.reset()
            else:
                self._crop(keep)

    def _crop(self, keep: int) -> None:
        columns = None if self.columns is None else self.columns[:, :keep]
        stores = [layer.store for layer in self._compressed if layer.store is not None]
        lengths: list[int] = [keep] * stores[0].batch if columns is None else columns.sum(1).tolist()
        # Refuse before anything is changed.
        for store in stores:
            store.check_crop(lengths)
        windows, states = self._windows(), self._states()
        for layer in windows:
            check_sliding_crop(layer, keep)
        removes = any(compressed.columns > keep for compressed in self._compressed)
        # What a state has seen is not known; a step that was cut short may have reached it.
        drop = max(x.get_seq_length() for x in (*self._compressed, *windows)) - keep
        if drop:
            for layer in states:
                check_state_crop(layer)
        with self.guard.change():
            for layer in windows:
                surplus = max(0, layer.get_seq_length() - keep)
                if surplus or getattr(layer, "record_past", False):
                    layer.crop(-surplus)
            for layer in states:
                if layer not in windows and layer.record_past:
                    LinearAttentionCacheLayerMixin.crop(layer, -drop)
            for compressed in self._compressed:
                if compressed.store is not None:
                    compressed.store.crop(lengths)
                if removes:
                    compressed.read = []
                compressed.columns, compressed._pending = keep, None
            self.columns = _with_padding(columns)

    def _windows(self) -> list[Any]:
        """Attention layers of transformers' own kind that hold something."""
        layers = [x for x in cast(list[Any], self.layers) if isinstance(x, CacheLayerMixin)]
        return [x for x in layers if x not in self._compressed and x.is_initialized]

    def _states(self) -> list[Any]:
        """Layers that hold a convolution or recurrent state, compressed ones included."""
        layers = [x for x in self.layers if isinstance(x, LinearAttentionCacheLayerMixin)]
        conv, recurrent = "is_conv_states_initialized", "is_recurrent_states_initialized"
        return [x for x in layers if any((*getattr(x, conv).values(), *getattr(x, recurrent).values()))]

    def reset(self) -> None:
        """Empty the cache, whatever happened to it."""
        with self.guard.restart():
            self.replay.forget()
            for state in self._states():
                # Left to themselves they keep their tensors, and take no other batch size after.
                for started in (state.is_conv_states_initialized, state.is_recurrent_states_initialized):
                    started.update(dict.fromkeys(started, False))
            super().reset()
            for layer in cast(list[Any], self.layers):
                # Otherwise transformers 5.17 keeps their old tokens, as zeros.
                layer.is_initialized = False
            self.columns = self._step = self._next_columns = None
            self.guard.stream = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i a copy of old row beam_idx[i]; encoded pages are shared.

        Raises:
            InputError: as `batch_select_indices`.
        """
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch, in this order; encoded pages are shared.

        Raises:
            InputError: `indices` is empty, or names rows that the cache does not have.
        """
        self._take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; encoded pages are shared between the copies.

        Raises:
            InputError: `repeats` is not an integer, or below 1.
        """
        repeats = _integer("rows are repeated", repeats)
        if repeats < 1:
            raise InputError(f"rows can be repeated once or more, got {repeats}")
        batch = self._batch()
        if batch is not None:
            self._take_rows(torch.arange(batch, device="cpu").repeat_interleave(repeats))

    def _batch(self) -> int | None:
        """Rows held; None while the cache is empty."""
        store = self._compressed[0].store
        return None if store is None else store.batch

    def _take_rows(self, rows: Tensor) -> None:
        """Make row i a copy of old row rows[i] in every layer."""
        batch, rows = self._batch(), torch.as_tensor(rows, device="cpu")
        if batch is None:
            return
        if rows.dtype == torch.bool:
            if rows.shape != (batch,):
                raise InputError(f"a mask of rows has shape {tuple(rows.shape)}, the batch is {batch}")
            rows = rows.nonzero().flatten()
        if rows.ndim != 1 or rows.is_floating_point() or not len(rows):
            raise InputError(f"rows must be a list of integers, got {tuple(rows.shape)}, {rows.dtype}")
        if int(rows.min()) < 0 or int(rows.max()) >= batch:
            raise InputError(f"rows {rows.tolist()} are not all among the {batch} of this cache")
        rows = rows.long()
        with self.guard.change():
            # `reorder_cache` takes any rows, and is the only such method that states have.
            windows = self._windows()
            for layer in windows:
                layer.reorder_cache(rows)
            for layer in self._states():
                if layer not in windows:
                    LinearAttentionCacheLayerMixin.reorder_cache(layer, cast(torch.LongTensor, rows))
            for compressed in self._compressed:
                if compressed.store is not None:
                    compressed.store.select_rows(rows)
                    compressed.select_read(rows.tolist())
                compressed._pending = None
            if self.columns is not None:
                self.columns = _with_padding(self.columns[rows.to(self.columns.device)])

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
        model = unwrap(model)
        self.check_module(model)
        with self.guard.use():
            save(self, model, path)

    @classmethod
    def load(cls, model: PreTrainedModel, path: str | Path, offloading: bool | None = None) -> SelfIndexCache:
        """A cache as `save` left it, with the options it had; None keeps `offloading` as well.

        `batch_repeat_interleave(n)` then gives n requests the same prefix; its pages are shared.

        Raises:
            FormatError: the file is missing, damaged, newer, or of another model or dtype.
        """
        model = unwrap(model)
        options = {} if offloading is None else {"offloading": offloading}
        header = read_header(path, model)
        cache = cls(model, read_options(header, path), **options)
        load(cache, model, path, header)
        return cache

    def report(self) -> Report:
        """Memory by kind, ratio to 16-bit keys and values, tokens read by the last step."""
        return Report(
            preset=self.config.preset,
            layers=[
                LayerReport.of(layer.layer_idx, layer.store, layer.unread)
                for layer in self._compressed
                if layer.store is not None
            ],
            other_layers=len(self.layers) - len(self._compressed),
            other_bytes=sum(held_bytes(layer) for layer in self.layers if layer not in self._compressed),
        )
