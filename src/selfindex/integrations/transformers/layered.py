"""The layers of a cache, and what happens in all of them at once: steps in order, positions, crop, rows."""

from __future__ import annotations

import operator
import weakref
from typing import Any, cast

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
from ...config import SelfIndexConfig
from ...errors import InputError, StateError
from ...store.change import Statistics
from .adapters import ModelState
from .finite import FiniteCheck
from .guard import Guard
from .layer import LinearAndSelfIndexLayer, SelfIndexLayer
from .masks import new_positions
from .window import SlidingWindowLayer


def _with_padding(positions: Tensor | None) -> Tensor | None:
    """`SelfIndexCache.positions` after some were dropped: None if no padding is left."""
    return None if positions is None or bool(positions.all()) else positions


def _integer(what: str, value: Any) -> int:
    """Python's form of an integer of any library, or of a tensor of one; transformers 5.17 passes these."""
    boolean = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        if not boolean:
            return operator.index(value)
    except TypeError:
        pass
    raise InputError(f"{what} one integer for all rows, got {value!r}")


def _check_state_crop(layer: Any) -> None:
    """Raise StateError if the state of a linear-attention layer cannot go back."""
    if not layer.is_croppable:
        raise StateError(
            "this model has linear-attention layers, whose recurrent state cannot go back; reset the cache, "
            "or go on from a fork() made before the tokens that should go"
        )
    if not layer.record_past:
        raise StateError(
            "a convolution layer has dropped the states it would need after crop; call "
            "cache.activate_past_recording() before the tokens that may go, or reset the cache"
        )


def _check_sliding_crop(layer: Any, keep: int) -> None:
    """Raise StateError if a sliding-window layer cannot go back to `keep` tokens."""
    past = layer.get_seq_length()
    full = getattr(layer, "is_sliding", False) and layer.sliding_window <= past
    if full and keep < past and not layer.record_past:
        raise StateError(
            "a sliding-window layer has dropped the tokens it would need after crop; call "
            "cache.activate_past_recording() before the tokens that may go, or reset the cache"
        )
    if layer.keys.shape != layer.values.shape or (not full and layer.keys.shape[-2] != past):
        raise StateError("a sliding-window layer was interrupted while it took tokens; reset the cache")


class LayeredCache(Cache):
    """Layers that hold the same positions of the same rows; `SelfIndexCache` is one.

    Args:
        model: the model whose passes fill it.
        dense: transformers' own layers, one for each of the model's.
        full: indices of those that compressed layers replace.
        balance: float32 [H, d] by layer, of a profile; other layers measure theirs.

    Attributes:
        config: options of the steps to come.
        plans: what the layers of a step share.
        state: the model as it was when the cache was filled.
        guard: keeps the cache whole.
        finite: whether tokens of the pass are numbers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: SelfIndexConfig,
        dense: list[Any],
        full: list[int],
        balance: dict[int, Tensor],
    ) -> None:
        self.config = config
        self.plans = StepPlans()
        self.finite = FiniteCheck()
        layers = list(dense)
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
        self._before: tuple[int, list[Statistics | None]] = 0, []
        """Columns and statistics of the layers before the latest pass."""
        self.positions: Tensor | None = None
        """bool [B, positions] of real tokens; None while there was no padding."""
        self._step: Tensor | None = None
        self._next_positions: Tensor | None = None
        self.guard = Guard()

    @property
    def is_initialized(self) -> bool:
        """Whether tokens are held."""
        return all(layer.is_initialized for layer in self._compressed)

    @property
    def compressed_layers(self) -> list[SelfIndexLayer]:
        """The layers this cache compresses, in order."""
        return self._compressed

    def check_module(self, module: nn.Module) -> None:
        """Raise StateError if an attention module of another model uses this cache."""
        if module not in self._modules:
            raise StateError("this cache was built for another model; build one with SelfIndexCache(model)")

    def check_order(self, layer: SelfIndexLayer, new: int, compressed_only: bool) -> None:
        """Raise StateError unless the layers before this one have just taken the same `new` tokens."""
        position = self._compressed.index(layer)
        before = self._compressed[position - 1]
        next_to = position and before.layer_idx + 1 == layer.layer_idx
        if next_to and before.get_seq_length() == layer.positions + new:
            return  # as a rule
        layers = cast(list[Any], self.layers)
        between = [(x, layer.positions + new) for x in layers[: layer.layer_idx]]
        if position:
            between = between[before.layer_idx :]
        else:
            # The step before this one has to have come to its end.
            between += [(x, layer.positions) for x in layers[before.layer_idx :]]
        for other, expected in between:
            if other is layer or (compressed_only and other not in self._compressed):
                continue
            if not isinstance(other, CacheLayerMixin):
                continue  # a linear-attention state does not know how many tokens it has seen
            held = other.get_seq_length()
            if held != expected:
                common = min(x.positions for x in self._compressed)
                raise StateError(
                    f"layer {layer.layer_idx} got {new} tokens on top of {layer.positions}, while layer "
                    f"{layers.index(other)} holds {held}: a forward pass was interrupted or layers were "
                    f"called out of order. cache.crop({common}) returns to the last complete step, "
                    "cache.reset() empties the cache"
                )

    def begin_pass(self) -> None:
        """The first layer is handed the tokens of a pass."""
        self.finite.begin()
        stores = [layer.store for layer in self._compressed]
        self._before = self._compressed[0].positions, [None if x is None else x.statistics for x in stores]

    def end_pass(self) -> None:
        """The last layer has taken the tokens of a pass: look at them, and take them back if they are bad.

        Raises:
            InputError: keys or values are NaN or infinite.
        """
        try:
            self.finite.check()
        except InputError:
            keep, statistics = self._before
            self.crop(keep - self._compressed[-1].positions)
            for layer, before in zip(self._compressed, statistics, strict=True):
                if layer.store is not None and before is not None:
                    layer.store.statistics = before
            raise

    def step_positions(self, layer: SelfIndexLayer, mask: Tensor | None, new: int) -> Tensor | None:
        """Which new positions hold tokens, bool [B, T] or None for all; read once per forward pass."""
        if layer is self._compressed[0] and layer.store is not None:
            self.plans.begin()
            batch, past, device = layer.store.batch, layer.positions, layer.store.window.keys.device
            self._step, kept = new_positions(mask, self.positions, past, new, batch)
            if kept is not None:
                self._hide(kept.to(device))
            self._next_positions = None
            if self._step is not None or self.positions is not None:
                ones = torch.ones(batch, past + new, dtype=torch.bool, device=device)
                old = ones[:, :past] if self.positions is None else self.positions
                self._next_positions = torch.cat(
                    (old, ones[:, past:] if self._step is None else self._step), 1
                )
        return self._step

    def _hide(self, kept: Tensor) -> None:
        """Let go of the last tokens of rows, such as filler after their end; positions stay, as padding.

        In all layers, so that they agree even if the pass that brought the mask fails.

        Args:
            kept: bool [B, positions] of the tokens that stay.
        """
        lengths = kept.sum(1).tolist()
        stores = [layer.store for layer in self._compressed if layer.store is not None]
        for store in stores:
            store.check_crop(lengths)
        with self.guard.change():
            for store in stores:
                store.crop(lengths)
            for layer in self._compressed:
                layer.last = None
            self.positions = kept

    def keep_positions(self, layer: SelfIndexLayer) -> None:
        """Take over what `step_positions` read, now that the first layer holds the tokens."""
        if layer is self._compressed[0]:
            self.positions = self._next_positions

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens.

        Args:
            tokens_to_remove: an integer, or a tensor of one. Negative: this many positions from the end of
                every row, as transformers calls it; all of them empty the cache. Positive: keep this many,
                as in transformers before 5.18, which since refuses it; as many as there are, or more,
                keep all. 0 only returns from a step that was cut short to the last complete one.

        Raises:
            InputError: not an integer.
            StateError: the paper preset would have to cut inside its prompt.
        """
        amount = _integer("crop takes", tokens_to_remove)
        common = min(layer.positions for layer in self._compressed)
        keep = max(0, min(amount if amount > 0 else common + amount, common))
        with self.guard.use():
            if keep == 0:
                self.reset()
            else:
                self._crop(keep)

    def _crop(self, keep: int) -> None:
        positions = None if self.positions is None else self.positions[:, :keep]
        stores = [layer.store for layer in self._compressed if layer.store is not None]
        lengths: list[int] = [keep] * stores[0].batch if positions is None else positions.sum(1).tolist()
        # Refuse before anything is changed.
        for store in stores:
            store.check_crop(lengths)
        windows, states = self._windows(), self._states()
        for layer in windows:
            _check_sliding_crop(layer, keep)
        removes = any(compressed.positions > keep for compressed in self._compressed)
        # What a state has seen is not known; a step that was cut short may have reached it.
        drop = max(x.get_seq_length() for x in (*self._compressed, *windows)) - keep
        if drop:
            for layer in states:
                _check_state_crop(layer)
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
                    compressed.last = None
                compressed.positions, compressed._pending = keep, None
            self.positions = _with_padding(positions)

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
            for state in self._states():
                # Left to themselves they keep their tensors, and take no other batch size after.
                for started in (state.is_conv_states_initialized, state.is_recurrent_states_initialized):
                    started.update(dict.fromkeys(started, False))
            super().reset()
            for layer in cast(list[Any], self.layers):
                # Otherwise transformers 5.17 keeps their old tokens, as zeros.
                layer.is_initialized = False
            self.positions = self._step = self._next_positions = None
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
                    if compressed.last is not None:
                        compressed.last = compressed.last.select(rows.tolist())
                compressed._pending = None
            if self.positions is not None:
                self.positions = _with_padding(self.positions[rows.to(self.positions.device)])
