"""Keeps a cache whole: one thread at a time, steps in order, and no change cut short goes unnoticed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.cache_utils import CacheLayerMixin

from ...errors import StateError

if TYPE_CHECKING:
    from .cache import SelfIndexCache
    from .layer import SelfIndexLayer


class Guard:
    """Refuses a cache to a second thread, and after a change that an exception cut short.

    Whatever can fail for a reason (memory, bad input) is worked out before `change` begins. An
    exception inside it, or an interrupt at any instruction, leaves `torn` set.

    Attributes:
        torn: a change began and did not end; only `restart` gets out of this.
        stream: the CUDA stream that a cache with forks runs on; None if it has none.
    """

    def __init__(self) -> None:
        self.torn = False
        self.stream: int | None = None
        self._lock = threading.RLock()

    def of_fork(self, one_at_a_time: bool) -> Guard:
        """The guard of a fork; with `one_at_a_time`, a thread in one of them keeps the others closed."""
        new = Guard()
        new.stream = self.stream
        if one_at_a_time:
            new._lock = self._lock
        return new

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run a block that reads the cache.

        Raises:
            StateError: another thread is in such a block, or the cache is torn.
        """
        self._enter()
        try:
            if self.torn:
                raise StateError(
                    "a change of this cache was cut short by an exception or an interrupt, and its layers "
                    "may no longer agree; call cache.reset() and fill it again"
                )
            if self.stream is not None and torch.cuda.current_stream().cuda_stream != self.stream:
                raise StateError(
                    "forks of a cache share pages and have to run on the CUDA stream that fork() was called "
                    "on; copy.deepcopy(cache) gives a cache that shares nothing"
                )
            yield
        finally:
            self._lock.release()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Run a block that must run to its end. Raises as `use`."""
        with self.use():
            self.torn = True
            yield
            self.torn = False

    @contextmanager
    def restart(self) -> Iterator[None]:
        """Run a block that empties the cache, torn or not; one that is cut short can be repeated."""
        self._enter()
        try:
            self.torn = True
            yield
            self.torn = False
        finally:
            self._lock.release()

    def _enter(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "this cache is in use by another thread; a cache serves one thread at a time. "
                "cache.fork() gives each its own, at the cost of its full-precision tokens"
            )


def check_order(cache: SelfIndexCache, layer: SelfIndexLayer, new: int, compressed_only: bool) -> None:
    """Raise StateError unless the layers before this one have just taken the same `new` tokens."""
    position = cache.compressed_layers.index(layer)
    before = cache.compressed_layers[position - 1]
    layers = cast(list[Any], cache.layers)
    between = [(x, layer.columns + new) for x in layers[: layer.layer_idx]]
    if position:
        between = between[before.layer_idx :]
    else:
        # The step before this one has to have come to its end.
        between += [(x, layer.columns) for x in layers[before.layer_idx :]]
    for other, expected in between:
        if other is layer or (compressed_only and other not in cache.compressed_layers):
            continue
        if not isinstance(other, CacheLayerMixin):
            continue  # a linear-attention state does not know how many tokens it has seen
        held = other.get_seq_length()
        if held != expected:
            common = min(x.columns for x in cache.compressed_layers)
            raise StateError(
                f"layer {layer.layer_idx} got {new} tokens on top of {layer.columns}, while layer "
                f"{layers.index(other)} holds {held}: a forward pass was interrupted or layers were called "
                f"out of order. cache.crop({common}) returns to the last complete step, cache.reset() "
                "empties the cache"
            )


def check_state_crop(layer: Any) -> None:
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


def check_sliding_crop(layer: Any, keep: int) -> None:
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
