"""Forward passes of a few tokens a row as a CUDA graph.

An eager step of a small batch spends more time in Python than on the GPU. A step of fixed shape
(`attention.step.FixedPlan`) is recorded once and replayed from then on: the host plans it, the GPU
runs it, the host takes the tokens over. Whatever a replay cannot do right runs step by step.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache as once
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ...attention.attend import MOST_STEP_TOKENS
from ...attention.missed import LastStep
from ...attention.step import FixedPlan, budgets_of
from ...store import LayerStore
from .graphs import RecordedModel, Recorder
from .layered import LayeredCache
from .models import cache_argument
from .windows import Windows, window_layers

MOST_RECORDINGS = 2 * MOST_STEP_TOKENS
"""Graphs a cache keeps: steps of every length, and those of short prompts."""

KNOWN = {"input_ids", "position_ids", "attention_mask", "use_cache", "logits_to_keep", "return_dict"}
"""Arguments of a forward pass that a replay understands; it takes no other that is not None or False."""

DEPENDENCE = 0.05
"""Relative change of the logits from which on a step is taken to depend on numbers that only Python
knows. Rounding stays far below; another position does not."""


@once
def announce(reason: str) -> None:
    """Say once that steps run one by one."""
    warnings.warn(
        f"selfindex runs decode steps one by one, not as a CUDA graph, which is slower: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


@dataclass
class _Recording:
    """A step of fixed shape, and on a GPU its graph.

    Attributes:
        plan, given: what the host writes before a step: the plan, and the model's arguments by name.
        model: the model as it was.
        places: addresses of the cache that the graph reads and writes.
        kind, outputs: the model's output, whose tensors every step overwrites.
    """

    plan: FixedPlan
    given: dict[str, Any]
    model: RecordedModel
    places: tuple[int, ...]
    kind: type = dict
    outputs: dict[str, Tensor] = field(default_factory=dict)
    graph: torch.cuda.CUDAGraph | None = None


class Replay:
    """Replays the steps of one cache.

    Attributes:
        emulate: run steps of fixed shape on a CPU as well, without a graph, for tests.
        steps: how many it has run.
    """

    def __init__(self) -> None:
        self.emulate = False
        self.steps = 0
        self._off = False
        self._recorder: Recorder | None = None
        self._windows = Windows()
        self._recordings: OrderedDict[tuple[object, ...], _Recording] = OrderedDict()

    def forget(self) -> None:
        """Drop what was recorded, together with what the cache holds."""
        self._recordings.clear()
        self._windows.forget()

    def step(
        self,
        cache: LayeredCache,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        given: dict[str, Any],
    ) -> Any | None:
        """Run a forward pass over a cache, or return None and change nothing.

        Args:
            forward: the model's own forward.
            given: its arguments by name, without the cache.
        """
        ids = given.get("input_ids")
        if (
            self._off
            or cache.plans.fixed is not None
            or not cache.config.cuda_graphs
            or not isinstance(ids, Tensor)
            or ids.ndim != 2
        ):
            return None
        if not ids.is_cuda and not (self.emulate or cache.config.compile):
            return None
        if not _is_step(cache, ids):
            return None
        if (reason := _why_not(cache, model, given)) is not None:
            announce(reason)
            return None
        with cache.guard.use():
            cache.state.check(thorough=False)
            if not _mask_fits(cache, given.get("attention_mask"), ids.shape[1]):
                return None
            if cache.config.compile:
                forward = _compiled(model)
            given = _complete(cache, given)
            recording = self._recording(cache, model, forward, given)
            if recording is None:
                return None
            recording.plan.update(_stores(cache)[0], cache.get_seq_length())
            for name in ("input_ids", "position_ids"):
                recording.given[name].copy_(given[name])
            for layer in cache.compressed_layers:
                layer.last = None  # its query may lie where this step writes its own
            if recording.graph is not None:
                recording.graph.replay()
            else:
                self._forward(cache, model, forward, recording)
            self._take_over(cache, recording)
        outputs = {name: x.clone() for name, x in recording.outputs.items()}
        return recording.kind(**outputs, **{cache_argument(model): cache})

    def _recording(
        self,
        cache: LayeredCache,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        given: dict[str, Any],
    ) -> _Recording | None:
        """The recording that serves a step; None if the step has to run as any other."""
        stores = _stores(cache)
        for store in stores:
            store.reserve(0, store.window_limit + MOST_STEP_TOKENS)
        self._windows.fill(cache)
        first, shapes = stores[0], [given[name].shape for name in ("input_ids", "position_ids")]
        phase = first.constants is None, any(first.unobserved)
        key = (cache.config, *shapes, given.get("logits_to_keep"), *phase)
        found = self._recordings.get(key)
        if found is None or found.places != self._places(cache) or not found.model.unchanged():
            self._recordings.pop(key, None)
            found = None
        state = RecordedModel(model) if found is None else found.model
        if (hooked := state.hooked()) is not None:
            announce(f"a {hooked} of the model has hooks, which a graph would not call")
            return None
        if found is None:
            own = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
            plan = FixedPlan(first, shapes[0][1], self._windows.hidden)
            found = _Recording(plan, own, state, self._places(cache))
            reason = self._record(cache, model, forward, found)
            if reason is not None:
                self._off = True
                self._recordings.clear()
                announce(reason)
                return None
            self._recordings[key] = found
            if len(self._recordings) > MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        return found

    def _record(
        self,
        cache: LayeredCache,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        recording: _Recording,
    ) -> str | None:
        """Record a step, or say why it cannot be."""
        plan, stores = recording.plan, _stores(cache)
        plan.positions = cache.get_seq_length()
        plan.update(stores[0], plan.positions)
        # The runs below write the new tokens where the step itself will; only this adds up.
        squares = [store.statistics.query_square.clone() for store in stores]

        def run() -> None:
            self._forward(cache, model, forward, recording)

        try:
            if model not in _dependent:
                _dependent[model] = _depends_on_python(run, recording)
            if _dependent[model]:
                return f"{type(model).__name__} computes with numbers that a graph would not update"
            device = recording.given["input_ids"].device
            if device.type == "cuda":
                self._recorder = self._recorder or Recorder(device)
                recording.graph = self._recorder.record(run)
            else:
                run()
            recording.places = self._places(cache)  # the first run may have made room
            if extra := recording.outputs.keys() - {"logits", "last_hidden_state"}:
                return f"{type(model).__name__} also returns {', '.join(sorted(extra))}"
        except Exception as error:  # whatever a model does in its forward
            said = " ".join(str(error).split())[:300] or type(error).__name__
            return f"recording a step of {type(model).__name__} failed: {said}"
        finally:
            for store, square in zip(stores, squares, strict=True):
                store.statistics.query_square.copy_(square)
        return None

    @staticmethod
    def _forward(
        cache: LayeredCache, model: PreTrainedModel, forward: Callable[..., Any], recording: _Recording
    ) -> None:
        cache.plans.begin()
        cache.plans.fixed = recording.plan
        try:
            output = forward(**recording.given, **{cache_argument(model): cache})
        finally:
            cache.plans.fixed = None
            cache.plans.begin()
        fields = {name: x for name, x in output.items() if x is not None and x is not cache}
        recording.kind, recording.outputs = type(output), fields

    def _take_over(self, cache: LayeredCache, recording: _Recording) -> None:
        """Have the cache hold the tokens that a step has put into its tensors."""
        stores, new, rows = _stores(cache), len(recording.plan.lengths), len(recording.plan.budgets)
        read, encoded = budgets_of(stores[0], new), [stores[0].encoded(b) for b in range(rows)]
        rooms, before = stores[0].unobserved, stores[0].statistics.queries_seen
        seen = tuple(n + min(new, room) for n, room in zip(before, rooms, strict=True))
        if any(rooms):  # the step has added up their squares
            for store in stores:
                store.statistics = replace(store.statistics, queries_seen=seen)
        cache.finite.begin()
        numbers = [layer.layer_idx for layer in cache.compressed_layers]
        changes = [store.plan_step(new, cache.finite.of(i)) for store, i in zip(stores, numbers, strict=True)]
        cache.finite.check()
        positions = cache.positions
        if positions is not None:
            positions = torch.cat((positions, positions.new_ones(rows, new)), 1)
        with cache.guard.change():
            for layer, store, change in zip(cache.compressed_layers, stores, changes, strict=True):
                layer.last = LastStep(read, encoded, recording.plan.asked[layer.layer_idx])
                store.commit(change)
                layer.positions += new
            cache.positions = positions
            self._windows.advance(cache, new)
        self.steps += 1

    def _places(self, cache: LayeredCache) -> tuple[int, ...]:
        """Addresses that a graph of a step reads and writes, and that may change."""
        return (*_store_places(_stores(cache)), *self._windows.places(cache))


def _stores(cache: LayeredCache) -> list[LayerStore]:
    return [cast(LayerStore, layer.store) for layer in cache.compressed_layers]


def _store_places(stores: list[LayerStore]) -> list[int]:
    """Of the compressed layers."""
    found: list[int] = []
    for store in stores:
        tensors = (store.pool.index, store.pool.payload, store.window.keys, store.window.values)
        found += [x.data_ptr() for x in (*tensors, store.table.padded()[0], store.statistics.query_square)]
        if store.constants is not None:
            found.append(store.constants.data_ptr())
        if store.pool.recent is not None:
            found.append(store.pool.recent.address)
    return found


def _is_step(cache: LayeredCache, ids: Tensor) -> bool:
    """Whether these are new tokens of a step that nobody observes; all layers hold the same before it."""
    first, new, positions = (
        cache.compressed_layers[0].store,
        ids.shape[1],
        cache.compressed_layers[0].positions,
    )
    if first is None or not positions or torch.is_grad_enabled() or first.batch != ids.shape[0]:
        return False
    if not 1 <= new <= min(MOST_STEP_TOKENS, cache.config.sparse_queries):
        return False
    if first.constants is None and cache.config.preset != "balanced":
        return False
    return all(
        layer.observer is None
        and layer.positions == positions
        and layer.store is not None
        and layer.store.window.lengths == first.window.lengths
        and layer.store.table.pages == first.table.pages
        and layer.store.statistics.has_constants == first.statistics.has_constants
        for layer in cache.compressed_layers
    ) and all(
        layer.is_initialized
        and layer.cumulative_length == positions
        and layer.batch == first.batch
        and layer.takes(new)
        for layer in window_layers(cache)
    )


def _why_not(cache: LayeredCache, model: PreTrainedModel, given: dict[str, Any]) -> str | None:
    """Why a step of this model and cache cannot be recorded; None if it can."""
    others = [name for name, x in given.items() if name not in KNOWN and x is not None and x is not False]
    if others:
        return f"the forward pass was given {', '.join(others)}"
    windows = window_layers(cache)
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        return "the model has layers with a linear-attention or convolution state"
    if len(windows) + len(cache.compressed_layers) < len(cache.layers):
        return "the model has layers of another kind, whose cache changes its shape at every step"
    if windows and cache.config.compile:
        return "compile=True does not know sliding-window layers"
    devices = [*(store.window.keys.device for store in _stores(cache)), *(layer.device for layer in windows)]
    if len(set(devices)) > 1:
        return "the model's layers are on several devices"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "processes that work together could not agree on it"
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled(given["input_ids"].device.type):
        return "autocast converts weights anew in every step"
    if given.get("return_dict") is False or given.get("use_cache") is False:
        return "the forward pass was asked for a tuple, or not to use a cache"
    return None


def _mask_fits(cache: LayeredCache, mask: Any, new: int) -> bool:
    """Whether a mask says of the tokens held what the cache knows, and that all new ones are real."""
    known, past = cache.positions, cache.get_seq_length()
    if mask is None:
        return known is None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != past + new:
        return False
    seen = mask.bool()
    return bool(seen.all() if known is None else (seen[:, :past] == known).all() & seen[:, past:].all())


def _complete(cache: LayeredCache, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a step that say the same to every model, without what a step does not need."""
    ids, first = given["input_ids"], cache.get_seq_length()
    own = {"input_ids": ids, "position_ids": given.get("position_ids"), "use_cache": True}
    if own["position_ids"] is None:
        own["position_ids"] = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    if "logits_to_keep" in given:
        keep = given["logits_to_keep"]
        own["logits_to_keep"] = 0 if isinstance(keep, int) and keep >= ids.shape[1] else keep
    return own


_dependent: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def _depends_on_python(run: Callable[[], None], recording: _Recording) -> bool:
    """Whether logits change with the number of tokens that Python sees, which a graph keeps as it was."""
    run()
    one = {name: x.float().clone() for name, x in recording.outputs.items()}
    positions = recording.plan.positions
    recording.plan.positions = positions // 2
    try:
        run()
    finally:
        recording.plan.positions = positions
    return any(
        bool((recording.outputs[name].float() - x).norm() > DEPENDENCE * x.norm()) for name, x in one.items()
    )


_compiled_models: WeakKeyDictionary[PreTrainedModel, Callable[..., Any]] = WeakKeyDictionary()


def _compiled(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward, compiled as one graph; later caches use what was compiled before."""
    if model not in _compiled_models:
        # Without a reference to the model, which would keep its own entry alive.
        itself = ref(model)

        def forward(**given: Any) -> Any:
            return cast(PreTrainedModel, itself())(**given)

        _compiled_models[model] = torch.compile(forward, fullgraph=True)
    return _compiled_models[model]
