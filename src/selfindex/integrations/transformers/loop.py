"""Decode steps with fixed shapes, which a CUDA graph can replay.

An eager step of a small batch spends more time launching kernels than running them. Here a step
touches only tensors of fixed size and place: lengths, budgets and selections stay on the device,
the full-precision window has room for a whole page, and the block tables for all pages to come.
Between steps, once per page of tokens, the host encodes the page that left the window.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ...backends import ops
from ...errors import StateError
from ...store import LayerStore
from .attention import NewKeys
from .cache import SelfIndexCache
from .layer import SelfIndexLayer
from .models import cache_argument


def why_not(cache: SelfIndexCache) -> str | None:
    """Why steps of this cache cannot have fixed shapes; None if they can."""
    if cache.config.preset != "balanced":
        return f"preset {cache.config.preset!r} has no kernels"
    if len(cache.compressed_layers) != len(cache.layers):
        return "the model has sliding-window layers, whose cache changes its shape at every step"
    if len({x.store.raw.keys.device for x in cache.compressed_layers if x.store is not None}) > 1:
        return "the model's layers are on several devices"
    return None


def ready(cache: SelfIndexCache) -> bool:
    """Whether the balance is known, which the first tokens of a short prompt have yet to give."""
    return all(x.store is not None and x.store.constants is not None for x in cache.compressed_layers)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector from running: another graph that it destroys would end a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_streams: dict[torch.device, list[torch.cuda.Stream]] = {}
"""Streams of closed loops, for the next ones: cuBLAS keeps a workspace for each (32 MiB on Hopper)."""


def _free_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no open loop has captured a graph on."""
    try:
        return _streams[device].pop()
    except (KeyError, IndexError):
        return torch.cuda.Stream(device)


_compiled_models: WeakKeyDictionary[PreTrainedModel, Callable[..., Any]] = WeakKeyDictionary()


def _compiled(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward, compiled as one graph; later loops use what was compiled before."""
    if model not in _compiled_models:
        # Without a reference to the model, which would keep its own entry alive.
        itself = ref(model)

        def forward(**given: Any) -> Any:
            return cast(PreTrainedModel, itself())(**given)

        _compiled_models[model] = torch.compile(forward, fullgraph=True)
    return _compiled_models[model]


class _Layer(CacheLayerMixin):
    """A layer's stand-in during the loop."""

    is_sliding = False
    is_compileable = False

    def __init__(self, loop: DecodeLoop, layer: SelfIndexLayer, pages: int) -> None:
        super().__init__()
        assert layer.store is not None
        self.store: LayerStore = layer.store
        self._loop, self.format = loop, self.store.format.name
        shape, device = (self.store.batch, pages), self.store.raw.keys.device
        self.table = torch.zeros(shape, dtype=torch.int32, device=device)
        self.counts = torch.zeros(shape, dtype=torch.int32, device=device)
        self.is_initialized = True
        self.refresh()

    def refresh(self) -> None:
        """Take over the store's block table."""
        for mine, new in zip((self.table, self.counts), self.store.table.tensors(), strict=True):
            mine.zero_()
            mine[:, : new.shape[1]] = new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return NewKeys(self, key_states, value_states), value_states

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        new: NewKeys,
        mask: Tensor | None,
        scaling: float,
        sink_logit: Tensor | None,
        dense: Any,
    ) -> Tensor:
        """Attention of one new token a row, which is stored as well: [B, 1, Hq, d]."""
        store, loop = self.store, self._loop
        assert store.constants is not None  # `ready` has seen to it
        part, lse = ops.sparse_decode(
            query,
            store.pool.index,
            store.pool.payload,
            self.table,
            self.counts,
            loop.budgets,
            loop.width,
            store.constants,
            scaling,
            self.format,
        )
        return ops.window_attend(
            query,
            new.new_keys,
            new.new_values,
            store.raw.keys,
            store.raw.values,
            loop.lengths,
            part,
            lse,
            sink_logit,
            scaling,
        )

    def get_seq_length(self) -> int:
        return self._loop.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._loop.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        raise StateError("a decode loop takes over a filled cache")


class DecodeLoop:
    """Steps of one token a row over a filled cache; on a GPU they replay a CUDA graph.

    The cache must not be used otherwise until `close`.

    Args:
        cache: filled by a forward pass of `model`, `ready`, and not refused by `why_not`.
        steps: most steps to come; more raise StateError.
        compile: run the model through torch.compile: the first step takes a minute or more, the
            others less than before.

    Attributes:
        logits: float32 [B, vocabulary] of the last step. Overwritten by the next one.
    """

    def __init__(
        self, model: PreTrainedModel, cache: SelfIndexCache, steps: int, compile: bool = False
    ) -> None:
        reason = why_not(cache)
        if reason is not None or not ready(cache):
            raise StateError(f"no decode loop for this cache: {reason or 'its balance is not known yet'}")
        self.config, self._real = cache.config, cache
        self._run = _compiled(model) if compile else model
        self._stores = [cast(LayerStore, layer.store) for layer in cache.compressed_layers]
        first, config = self._stores[0], cache.config
        device = first.raw.keys.device
        self._limit = config.sinks + config.recent + config.page_size
        self.columns, self._left = cache.get_seq_length(), steps
        self._steps = self._counted = 0
        """Steps taken, and how many of them the cache knows of."""
        self._closed = False
        rows = range(first.batch)
        # A row encodes a page for every page of tokens to come, and at most one more.
        coming = 1 + steps // config.page_size
        pages = first.table.pages + coming
        longest = max(first.length(b) for b in rows) + steps
        room = min(longest, pages * config.page_size)
        self.width = max(1, config.budget_tokens(longest, room), min(config.dense_below, room))
        for store in self._stores:
            store.reserve(coming * first.batch, self._limit)
        positions = [n - 1 for n in map(first.length, rows)]
        self.lengths = torch.tensor(first.raw.lengths, dtype=torch.int32, device=device)
        self.encoded = torch.tensor([first.encoded(b) for b in rows], dtype=torch.int32, device=device)
        self.budgets = torch.zeros_like(self.encoded)
        self._ids = torch.zeros(first.batch, 1, dtype=torch.long, device=device)
        self._positions = torch.tensor(positions, dtype=torch.long, device=device)[:, None]
        self._layers = [_Layer(self, layer, pages) for layer in cache.compressed_layers]
        self._cache = Cache(layers=cast(list[Any], self._layers))
        self._argument = cache_argument(model)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._places: list[int] = []
        self.logits = torch.empty(0, device=device)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Feed tokens int64 [B]; returns `logits`.

        Raises:
            StateError: more steps than the loop was made for.
        """
        if self._closed:
            raise StateError("the decode loop is closed, or an earlier step failed; make another one")
        if self._steps == self._left:
            raise StateError(f"the decode loop was made for {self._left} steps")
        try:
            self._step(tokens)
        except BaseException:
            # Whole steps are in the cache, the failed one is not.
            self.close()
            raise
        return self.logits

    def _step(self, tokens: Tensor) -> None:
        self._ids.copy_(tokens[:, None])
        if self._ids.is_cuda:
            if self._graph is None or self._places != self._addresses():
                self._capture()
            cast(torch.cuda.CUDAGraph, self._graph).replay()
        else:
            self._forward()
        self._steps += 1
        if max(self._stores[0].raw.lengths) + self._steps - self._counted >= self._limit:
            self._encode()

    def close(self) -> None:
        """Hand the cache back, with the tokens of all steps in it. May be repeated."""
        if self._closed:
            return
        self._closed = True
        self._graph = None
        if self._stream is not None:
            # Until then a replay may use cuBLAS's workspace.
            self._stream.wait_stream(torch.cuda.current_stream(self._ids.device))
            _streams.setdefault(self._ids.device, []).append(self._stream)
            self._stream = None
        if not self._real.guard.torn:
            self.settle()

    def settle(self) -> None:
        """Tell the cache of the tokens that steps have put into its tensors, for its report to be right."""
        new, columns = self._steps - self._counted, self._real.columns
        if columns is not None:
            columns = torch.cat((columns, columns.new_ones(columns.shape[0], new)), 1)
        read = self.budgets.tolist()
        with self._real.guard.change():
            for layer, store in zip(self._real.compressed_layers, self._stores, strict=True):
                store.raw.lengths = [n + new for n in store.raw.lengths]
                layer.columns, layer.read = layer.columns + new, read
            self._real.columns, self._counted = columns, self._steps

    def _forward(self) -> None:
        config, total = self.config, self.encoded + self.lengths + 1
        if isinstance(config.budget, int):
            wanted = torch.full_like(total, config.budget)
        else:
            # Like SelfIndexConfig.budget_tokens, in the same precision.
            wanted = (total.double() * config.budget).ceil().int().clamp(min=config.min_tokens)
        budgets = torch.where(self.encoded <= config.dense_below, self.encoded, wanted)
        self.budgets.copy_(torch.minimum(budgets, self.encoded))
        self._positions += 1
        given: dict[str, Any] = {self._argument: self._cache, "use_cache": True}
        logits = self._run(input_ids=self._ids, position_ids=self._positions, **given).logits[:, -1].float()
        if self.logits.shape != logits.shape:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.lengths += 1

    def _capture(self) -> None:
        state = [x.clone() for x in (self.lengths, self._positions)]
        # A stream on which a capture failed is not used again.
        stream, self._stream = self._stream or _free_stream(self._ids.device), None
        stream.wait_stream(torch.cuda.current_stream(self._ids.device))
        with torch.cuda.device(self._ids.device), torch.cuda.stream(stream):
            self._forward()  # compiles kernels and allocates what libraries keep
            # The token it stored is overwritten by the step that follows.
            for now, before in zip((self.lengths, self._positions), state, strict=True):
                now.copy_(before)
            self._graph = torch.cuda.CUDAGraph()
            with _without_collection(), torch.cuda.graph(self._graph, stream=stream):
                self._forward()
        torch.cuda.current_stream(self._ids.device).wait_stream(stream)
        self._stream = stream
        self._places = self._addresses()

    def _addresses(self) -> list[int]:
        """Where the graph finds what may be moved."""
        moved = [
            x.data_ptr()
            for store in self._stores
            for x in (store.pool.index, store.pool.payload, store.raw.keys, store.raw.values)
        ]
        return moved + [x.pool.recent.address for x in self._stores if x.pool.recent is not None]

    def _encode(self) -> None:
        self.settle()
        for store in self._stores:
            change = store.plan_overflow()
            with self._real.guard.change():
                store.commit(change)
        first = self._stores[0]
        self.lengths.copy_(torch.tensor(first.raw.lengths, dtype=torch.int32))
        self.encoded.copy_(torch.tensor([first.encoded(b) for b in range(first.batch)], dtype=torch.int32))
        for layer in self._layers:
            layer.refresh()
