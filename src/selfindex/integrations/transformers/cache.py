"""`SelfIndexCache`: the KV cache users hand to a transformers model."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...attention.missed import missed_mass
from ...attention.step import StepPlans
from ...codec import BalanceProfile
from ...config import SelfIndexConfig
from ...errors import InputError, StateError
from ...report import LayerReport, Report, held_bytes
from .guard import Guard
from .inputs import check_no_weights
from .layered import LayeredCache
from .models import plan_layers
from .prepare import prepare
from .replay import Replay
from .saving import load, read_header, read_options, save
from .wrappers import unwrap


class SelfIndexCache(LayeredCache):
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
        config = SelfIndexConfig.make(config, **options)
        dense, full = plan_layers(model, config)
        balance: dict[int, Tensor] = {}
        if config.profile is not None:
            balance = BalanceProfile.load(config.profile).balance
            missing = [i for i in full if i not in balance]
            if missing:
                raise InputError(f"the profile {config.profile} lacks layers {missing} of this model")
        if _prepare:
            prepare(model)
        super().__init__(model, config, dense.layers, full, balance)
        self.replay = Replay()

    def __repr__(self) -> str:
        config, batch, held = self.config, self._batch(), "empty"
        if batch is not None and self._compressed[0].positions:
            size = self.report(missed=False).memory.total / 2**20
            held = f"rows={batch}, tokens={self._compressed[0].positions}, {size:.2f} MiB"
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

    def update(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """What a model's attention layer calls; see `SelfIndexLayer.update`.

        Raises:
            InputError: the pass is to return attention weights.
        """
        # Before any layer has changed, one with a sliding window included.
        check_no_weights(kwargs.get("kwargs"))
        return super().update(*args, **kwargs)

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

    def reset(self) -> None:
        """Empty the cache, whatever happened to it."""
        with self.guard.restart():
            self.replay.forget()
            super().reset()

    def profile(self) -> BalanceProfile:
        """The balance this cache measured, to be saved and passed as `profile=` later.

        Of several rows with one of their own it is the geometric mean.

        Raises:
            StateError: nothing was encoded yet, or the preset has no balance.
        """
        balance = {}
        for layer in self._compressed:
            own = None if layer.store is None else layer.store.statistics.own
            if own is None or self.config.preset != "balanced":
                raise StateError(
                    "no balance yet: the balanced preset measures it when it encodes its first page"
                )
            balance[layer.layer_idx] = own.log().mean(0).exp() if len(own) > 1 else own[0]
        return BalanceProfile(balance)

    def save(self, model: PreTrainedModel, path: str | Path) -> None:
        """Write what the cache holds to a safetensors file, to go on from it in another process.

        Raises:
            StateError: the cache is empty, or a forward pass was interrupted.
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

    def report(self, missed: bool = True) -> Report:
        """Memory by kind, ratio to 16-bit keys and values, tokens and attention mass read by the last step.

        Args:
            missed: work out the attention mass that the last step missed, which reads as much as a step
                that attends to all tokens; with offloading, all of the payload through the GPU's bus.
        """
        shares, unknown = self._missed() if missed else ({}, "not asked for")
        return Report(
            preset=self.config.preset,
            layers=[
                LayerReport.of(layer.layer_idx, layer.store, layer.last, shares.get(layer.layer_idx))
                for layer in self._compressed
                if layer.store is not None
            ],
            missed_unknown=unknown,
            other_layers=len(self.layers) - len(self._compressed),
            other_bytes=sum(held_bytes(layer) for layer in self.layers if layer not in self._compressed),
        )

    def _missed(self) -> tuple[dict[int, Tensor], str | None]:
        """What `missed_mass` finds, by layer; or nothing, and why not."""
        found = {}
        try:
            with self.guard.use():
                for layer in self._compressed:
                    if layer.store is None or layer.last is None:
                        return {}, "no step has run on what is held now"
                    share = missed_mass(layer.store, layer.last)
                    if share is None:
                        return {}, "the last pass ended in padding"
                    found[layer.layer_idx] = share
        except StateError as error:
            return {}, str(error)
        return found, None
