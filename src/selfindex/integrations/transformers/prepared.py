"""Methods of a model that know this cache: its forward pass, and what `generate` makes of its arguments.

They are put on the instance, so that other models of the class are untouched, as bound methods, so
that a copy of the model has its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import update_wrapper
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from transformers import PreTrainedModel

from .replay import Replay

if TYPE_CHECKING:
    from .cache import SelfIndexCache

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names of a model's cache argument: transformers 5.24 renamed the latter."""


def replace_methods(model: PreTrainedModel) -> Callable[[], None]:
    """Have steps over a SelfIndexCache replayed, and a cache that a model drops begin anew.

    Returns:
        a function that puts back what was there.
    """
    before = {}
    for name, method in (("forward", _forward), ("prepare_inputs_for_generation", _prepare_inputs)):
        if hasattr(model, name):
            before[name] = model.__dict__.get(name)
            model.__dict__[name] = MethodType(method(getattr(model, name)), model)
    placed = {name: model.__dict__[name] for name in before}

    def restore() -> None:
        for name, old in before.items():
            if model.__dict__.get(name) is placed[name]:
                if old is None:
                    del model.__dict__[name]
                else:
                    model.__dict__[name] = old

    return restore


def _is_ours(cache: Any) -> TypeGuard[SelfIndexCache]:
    return isinstance(getattr(cache, "replay", None), Replay)


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method as a function of the model, so that it follows a copy of the model."""
    own = getattr(method, "__func__", None)
    return own if own is not None else lambda _, *args, **given: method(*args, **given)


def _looks_like(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the method's name, documentation and signature, which transformers reads."""
    update_wrapper(function, method)
    signature = inspect.signature(method)
    model = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    vars(function)["__signature__"] = signature.replace(parameters=[model, *signature.parameters.values()])
    return function


def _forward(method: Callable[..., Any]) -> Callable[..., Any]:
    original, names = _function(method), list(inspect.signature(method).parameters)

    def forward(self: PreTrainedModel, *args: Any, **given: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **given)
        named = given | dict(zip(names, args, strict=False)) if args else given
        for name in CACHE_ARGUMENTS:
            cache = named.get(name)
            if _is_ours(cache):
                rest = {key: x for key, x in named.items() if key != name}
                output = cache.replay.step(cache, self, MethodType(original, self), rest)
                if output is not None:
                    return output
        return original(self, *args, **given)

    return _looks_like(method, forward)


def _prepare_inputs(method: Callable[..., Any]) -> Callable[..., Any]:
    original = _function(method)

    def prepare_inputs_for_generation(self: PreTrainedModel, *args: Any, **given: Any) -> Any:
        inputs = original(self, *args, **given)
        for name in CACHE_ARGUMENTS:
            cache = given.get(name)
            if _is_ours(cache) and inputs.get(name) is None:
                # Models whose rotary factors change at a length compute all keys anew from there on.
                cache.reset()
                inputs[name] = cache
        return inputs

    return _looks_like(method, prepare_inputs_for_generation)
