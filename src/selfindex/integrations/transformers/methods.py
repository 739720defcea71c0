"""Methods of a prepared model that know this cache: its forward pass, and what `generate` hands to it.

They stand on the instance, so that other models of the class are untouched. With any other cache,
and without one, they do what the model did before.
"""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from .replay import Replay

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names of a model's cache argument: transformers 5.24 renamed the latter."""


def _is_ours(cache: Any) -> TypeGuard[Any]:
    return isinstance(getattr(cache, "replay", None), Replay)


class _StandIn(ABC):
    """Stands in for a method of one model.

    Args:
        model: referred to weakly: it would keep itself alive otherwise.
        before: what stood on the instance in its place, None if nothing did.
    """

    name: str

    def __init__(self, model: Any, before: Any = None) -> None:
        self._model, self.before = weakref.ref(model), before
        self.__signature__ = inspect.signature(self._own(model))

    def _own(self, model: Any) -> Callable[..., Any]:
        """The method that was there before."""
        return self.before or MethodType(getattr(type(model), self.name), model)

    def __call__(self, *args: Any, **given: Any) -> Any:
        model = self._model()
        assert model is not None  # the caller has it
        if torch.compiler.is_compiling():
            # Spelled out: torch.compile does not follow methods that are made on the way.
            if self.before is not None:
                return self.before(*args, **given)
            return getattr(type(model), self.name)(model, *args, **given)
        return self.run(model, self._own(model), args, given)

    @abstractmethod
    def run(self, model: Any, own: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Do what the method does; `own` is the one that was there before."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _StandIn:
        model = self._model()
        return type(self)(memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model(), self.name)


class _Forward(_StandIn):
    name = "forward"

    def run(self, model: Any, own: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        named = given
        if args:
            named = given | dict(zip(self.__signature__.parameters, args, strict=False))
        for name in CACHE_ARGUMENTS:
            cache = named.get(name)
            if _is_ours(cache):
                rest = {key: x for key, x in named.items() if key != name}
                output = cache.replay.step(cache, model, own, rest)
                if output is not None:
                    return output
        return own(*args, **given)


class _PrepareInputs(_StandIn):
    name = "prepare_inputs_for_generation"

    def run(self, model: Any, own: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        inputs = own(*args, **given)
        for name in CACHE_ARGUMENTS:
            cache = given.get(name)
            if _is_ours(cache) and inputs.get(name) is None:
                # Models whose rotary factors change at a length compute all keys anew from there on, and
                # need all tokens for it: transformers 5.17 would hand on the last one.
                inputs = own(*args, **(given | {name: None, "next_sequence_length": None}))
                cache.reset()
                inputs[name] = cache
        return inputs


class _Replicate(_StandIn):
    """Replicas of `DataParallel` are shallow copies, whose methods must not be this model's."""

    name = "_replicate_for_data_parallel"

    def run(self, model: Any, own: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        replica = own(*args, **given)
        for name, method in list(vars(replica).items()):
            if isinstance(method, _StandIn):
                del vars(replica)[name]
        return replica


_placed: WeakKeyDictionary[nn.Module, list[_StandIn]] = WeakKeyDictionary()


def place_methods(model: PreTrainedModel) -> None:
    """Put the methods on a model; not a second time."""
    if model in _placed or isinstance(vars(model).get("forward"), _StandIn):
        return
    kinds = (_Forward, _PrepareInputs, _Replicate)
    _placed[model] = [kind(model, vars(model).get(kind.name)) for kind in kinds if hasattr(model, kind.name)]
    for method in _placed[model]:
        vars(model)[method.name] = method


def remove_methods(model: PreTrainedModel) -> None:
    """Put back what was there; what somebody put over it since stays, and goes through to that."""
    for method in _placed.pop(model, []):
        if vars(model).get(method.name) is method:
            del vars(model)[method.name]
            if method.before is not None:
                vars(model)[method.name] = method.before
