"""One layer of the cache: what transformers calls while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from ...attention.attend import attend, is_step, take_step
from ...attention.missed import Asked, LastStep
from ...attention.prompt import attend_prompt
from ...attention.step import FixedPlan, StepPlans, attend_step
from ...config import SelfIndexConfig
from ...errors import StateError
from ...store import LayerStore
from ...store.change import Change
from .adapters import ModelState
from .finite import FiniteCheck
from .guard import Guard
from .inputs import check_new_tokens, check_query, full_precision
from .new_keys import NewKeys
from .observer import Observation, Observer
from .opaque import register_layer, run_layer
from .prompt import reads_sparsely

MASKED_CHUNK = 1024
"""New tokens up to which the model's own attention takes them behind held ones: some of these
implementations do so through a mask of all pairs."""


class Whole(Protocol):
    """What a layer asks of the cache that it is a part of; see `LayeredCache`."""

    config: SelfIndexConfig
    plans: StepPlans
    state: ModelState
    guard: Guard
    finite: FiniteCheck
    positions: Tensor | None

    @property
    def compressed_layers(self) -> list[SelfIndexLayer]: ...

    def check_module(self, module: nn.Module) -> None: ...

    def check_order(self, layer: SelfIndexLayer, new: int, compressed_only: bool) -> None: ...

    def begin_pass(self) -> None: ...

    def end_pass(self) -> None: ...

    def step_positions(self, layer: SelfIndexLayer, mask: Tensor | None, new: int) -> Tensor | None: ...

    def keep_positions(self, layer: SelfIndexLayer) -> None: ...


class SelfIndexLayer(CacheLayerMixin):
    """One compressed attention layer of a `SelfIndexCache`."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: Whole, layer_idx: int, balance: Tensor | None) -> None:
        super().__init__()
        self._cache: Whole = weakref.proxy(cache)
        self.layer_idx = layer_idx
        self._balance = balance
        self._plans = cache.plans
        self.store: LayerStore | None = None
        self.positions = 0
        self.sparse_prompts = cache.config.prefill == "sparse"
        self.last: LastStep | None = None
        """What the last step read; None if no step ran on what is held now."""
        self.record_past = False
        self.observer: Observer | None = None
        """Called with an `Observation` in every forward pass. While it is set, steps run one by one and
        not as a graph; copies of the cache do not have it."""
        self._pending: NewKeys | None = None
        self.handle = register_layer(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"observer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = register_layer(self)  # a copy is another layer

    def __repr__(self) -> str:
        if self.store is None or not self.positions:
            return f"{type(self).__name__}({self.layer_idx}, empty)"
        encoded = sum(self.store.encoded(b) for b in range(self.store.batch))
        return (
            f"{type(self).__name__}({self.layer_idx}, rows={self.store.batch}, tokens={self.positions}, "
            f"encoded={encoded}, {self.store.memory().total / 2**20:.2f} MiB)"
        )

    def __copy__(self) -> NoReturn:
        raise StateError("a layer is a part of its cache and has no copy of its own; copy the cache")

    @property
    def is_initialized(self) -> bool:
        """Whether tokens are held."""
        return self.positions > 0

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Ignored: transformers sets it at times that are not ours, what is held decides."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.store = LayerStore(self._cache.config, key_states, self._balance)

    @property
    def read(self) -> list[int]:
        """Per row, the encoded tokens that each KV head attended to in the last step; [] for no step."""
        return [] if self.last is None else self.last.read

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """Accept new keys and values [B, H, T, d]; they are stored once attention has run.

        Raises:
            InputError: wrong shape, dtype, device, batch size, or content.
            StateError: layers were called out of order.
        """
        if torch.compiler.is_compiling():
            return NewKeys(self, key_states, value_states), value_states
        return self.accept(key_states, value_states), value_states

    def accept(self, keys: Tensor, values: Tensor, compiled: bool = False) -> NewKeys:
        """What `update` does; `compiled`: inside a compiled graph, where dense layers change at its end."""
        if self._plans.fixed is not None:
            return NewKeys(self, keys, values)
        with self._cache.guard.use():
            held = self.store.window.keys if self.store is not None and self.positions else None
            check_new_tokens(keys, values, held)
            self._cache.check_order(self, keys.shape[2], compiled)
            self._check_state(keys.shape[2])
            if self is self._cache.compressed_layers[0]:
                self._cache.begin_pass()
            if keys.shape[2] > 1:
                self._cache.finite.note(self.layer_idx, keys, values)
            if not self.positions:
                # Also after a first step that failed.
                dtype = torch.promote_types(keys.dtype, values.dtype)
                self.lazy_initialization(keys.to(dtype), values)
            self._pending = NewKeys(self, keys, values)
            return self._pending

    def _check_state(self, new: int) -> None:
        """Once a step: refuse a model that is in another state than when the cache was filled."""
        if self is self._cache.compressed_layers[0]:
            if self.positions:
                self._cache.state.check(thorough=new > 1)
            else:
                self._cache.state.remember()

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
        if torch.compiler.is_compiling():
            return run_layer(self, query, new, mask, scaling, sink_logit, dense)
        self._cache.check_module(module)
        return self.finish(query, new, mask, scaling, sink_logit, dense)

    def finish(
        self,
        query: Tensor,
        new: NewKeys,
        mask: Tensor | None,
        scaling: float,
        sink_logit: Tensor | None,
        dense: Callable[..., tuple[Tensor, Any]] | None,
        compiled: bool = False,
    ) -> Tensor:
        """What `attend` does; without `dense`, which prompts need, everything else goes through the store.

        `compiled`: inside a compiled graph, which writes to the memory of its tensors when they were read.
        """
        cache = self._cache
        if self._plans.fixed is not None:
            return self._attend_fixed(query, new, scaling, sink_logit)
        with cache.guard.use():
            if new is not self._pending or self.store is None:
                raise StateError(
                    f"layer {self.layer_idx}: attention ran twice, or on keys of an earlier step"
                )
            keys, values, store = new.new_keys, new.new_values, self.store
            check_query(query, keys)
            valid = cache.step_positions(self, mask, keys.shape[2])
            if valid is not None:
                valid = valid.to(keys.device)  # with device_map, layers are on several devices
            step, read = is_step(store, query, valid), [0] * store.batch
            output: Tensor | None = None
            prompt = self.positions == 0
            sparse = prompt and reads_sparsely(cache.config, mask, query.shape[2])
            if not (step or sparse) and dense is not None:
                some = any(store.encoded(b) for b in range(store.batch))
                exact = not some and cache.positions is None and valid is None
                if prompt:
                    # Prefill is the model's own attention on its own tensors.
                    output = dense(query, keys, values, mask)[0]
                elif exact and keys.shape[2] <= MASKED_CHUNK:
                    held_k, held_v, _ = store.window.held()
                    joined = torch.cat((held_k, keys), 2), torch.cat((held_v, values), 2)
                    output = dense(query, *joined, mask)[0]
            with full_precision(keys.device):
                keys, values = store.window.fitted(keys, values)
                fitted = query if query.dtype is keys.dtype else query.to(keys.dtype)
                encoded = read
                if sparse:
                    output = attend_prompt(cache.config, fitted, keys, values, valid, scaling, sink_logit)
                    output = output.transpose(1, 2).contiguous()
                elif step:
                    output, plan = take_step(store, fitted, keys, values, scaling, sink_logit, cache.plans)
                    read, encoded = plan.read, plan.encoded
                else:
                    # Before this pass's own tokens may be encoded: these it has all attended to.
                    encoded = [store.encoded(b) for b in range(store.batch)]
                    if output is None:
                        output, read = attend(
                            store, fitted, keys, values, valid, scaling, sink_logit, cache.plans
                        )
                        output = output.transpose(1, 2).contiguous()
                assert output is not None
                # In a padded chunk, the last query of a row may be that of padding.
                known = read != encoded and (valid is None or bool(valid[:, -1].all()))
                asked = Asked.by(fitted, scaling, sink_logit, compiled) if known else None
                if output.dtype is not query.dtype:
                    output = output.to(query.dtype)
                if self.observer is not None:
                    self.observer(
                        Observation(self, query, new.new_keys, new.new_values, scaling, output, read)
                    )
                if step:
                    check = cache.finite.of(self.layer_idx)
                    self.take(store.plan_step(keys.shape[2], check, query), keys.shape[2])
                else:
                    self.commit(query, keys, values, valid, scaling)
                self.last = LastStep(read, encoded, asked)
            if self is cache.compressed_layers[-1]:
                cache.end_pass()
            return output

    def _attend_fixed(self, query: Tensor, new: NewKeys, scaling: float, sink_logit: Tensor | None) -> Tensor:
        """`attend` in a step of fixed shape, which touches the device only: see `replay`."""
        store, plan = cast(LayerStore, self.store), cast(FixedPlan, self._plans.fixed)
        if any(store.unobserved):
            counted = store.square(query) * plan.observed.T[:, None, :, None]
            store.statistics.query_square.add_(counted.sum(2))
        if (asked := plan.asked.get(self.layer_idx)) is None:  # the first run, which is not recorded
            plan.asked[self.layer_idx] = Asked.by(query, scaling, sink_logit, reused=True)
        else:
            asked.query.copy_(query[:, :, -1:])
        return attend_step(store, query, new.new_keys, new.new_values, plan, scaling, sink_logit)

    def commit(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float
    ) -> None:
        """Store tokens that attention has run for; arguments as `LayerStore.append`."""
        if self.store is None:
            self.lazy_initialization(keys, values)
        assert self.store is not None
        # Of a prompt, `accept` has looked at everything.
        check = self._cache.finite.of(self.layer_idx) if self.positions else _looked_at
        change = self.store.plan(keys, values, query, valid, scaling, self.record_past, check)
        self.take(change, keys.shape[2])

    def take(self, change: Change, new: int) -> None:
        """Store what was worked out for `new` positions."""
        assert self.store is not None
        with self._cache.guard.change():
            self.store.commit(change)
            self.positions += new
            self._cache.keep_positions(self)
        self._pending = None

    def activate_past_recording(self) -> None:
        """Tokens to come may be drafts: transformers says so before it decodes with an assistant."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included, as transformers counts."""
        fixed = self._plans.fixed
        return self.positions if fixed is None else fixed.positions

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Models ask before their layers run: here nothing has been computed yet.
        if self.positions and not torch.compiler.is_compiling() and self._plans.fixed is None:
            self._check_state(query_length)
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.store, self._pending, self.positions, self.last = None, None, 0, None
        self.record_past = False

    def offload(self) -> None:
        raise StateError(
            "transformers' offloading of whole layers does not fit this cache; make it with "
            "SelfIndexCache(model, offloading=True) to keep most of it in host memory"
        )

    def prefetch(self) -> None:
        self.offload()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> NoReturn:
        self._only_together("reorder_cache")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        self._only_together("batch_select_indices")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        self._only_together("batch_repeat_interleave")

    def crop(self, tokens_to_remove: int) -> NoReturn:
        self._only_together("crop")

    @staticmethod
    def _only_together(method: str) -> NoReturn:
        raise StateError(f"rows and tokens change in all layers at once: call the cache's {method}")


def _looked_at(keys: Tensor, values: Tensor) -> None:
    """Keys and values that have been looked at already."""


class LinearAndSelfIndexLayer(LinearAttentionLayer, SelfIndexLayer):  # type: ignore[override]
    """A compressed attention layer whose block has a linear-attention state as well, as in Falcon-H1.

    The state is kept as transformers keeps it.
    """

    is_compileable = False

    def __init__(self, cache: Whole, layer_idx: int, balance: Tensor | None, number_of_states: int) -> None:
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
