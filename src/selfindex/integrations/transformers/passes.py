"""Which attention a forward pass runs: this cache's in passes that are given one, the model's own in others.

transformers looks an attention function up by a name in the model's configuration. A prepared model has
the hooks of this file, which change the name when a pass with a `SelfIndexCache` begins and change it back
when it ends, so that nothing else (other caches, continuous batching, copies, saving) ever sees another name.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...errors import UnsupportedModelError

NAMES = {
    "sdpa": "selfindex",
    "eager": "selfindex_eager",
    "flash_attention_2": "selfindex_fa2",
    "flash_attention_3": "selfindex_fa3",
}
"""Dense implementation a model was loaded with -> the registered name that builds on it."""
_BASES = {name: base for base, name in NAMES.items()}


class _Running(threading.local):
    """Modules of this thread that are in a pass with this cache, outermost first, and what they switched."""

    def __init__(self) -> None:
        self.stack: list[tuple[int, Any]] = []


_running = _Running()
_switched: dict[int, list[Any]] = {}
"""id of a configuration -> itself and how many passes, of any thread, need its name switched."""
_lock = threading.Lock()


def running() -> bool:
    """Whether this thread is inside a pass with this cache."""
    return bool(_running.stack)


def text_models(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model and the models inside it that are handed its cache: not those of images or sound."""
    text = type(model.config.get_text_config(decoder=True))
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(text_config(module)) is text:
            yield module


def given_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a forward pass, by whatever name or position."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            return value
    return None


def text_config(model: nn.Module) -> Any:
    """Configuration of the text decoder, which is a part of that of a model with images."""
    return model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]


def _ours(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    cache = given_cache(args, kwargs)
    # Layers whose `update` gives `NewKeys`, of this cache or of a decode loop's stand-in for it.
    return cache is not None and any(hasattr(layer, "attend") for layer in cache.layers)


def _inside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a compiled pass is a step that is being recorded: the pass around it has switched the name."""
    plans = getattr(given_cache(args, kwargs), "plans", None)
    return plans is not None and plans.fixed is not None


def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook before `forward`. It has no state and no reference to the model, so that copies work."""
    ours = _ours(args, kwargs)
    if torch.compiler.is_compiling():
        if ours and not _inside(args, kwargs):
            config = text_config(module)
            config._attn_implementation_internal = NAMES.get(
                config._attn_implementation, config._attn_implementation
            )
        return
    stack = _running.stack
    for depth, (identity, _) in enumerate(stack):
        if identity == id(module):
            # A pass that an interrupt ended: `end` runs after exceptions, not after these.
            _leave(depth)
            break
    if ours:
        check = getattr(given_cache(args, kwargs), "check_module", None)
        if check is not None:
            check(module)  # inside a compiled graph, layers do not know whose attention calls them
        config = text_config(module)
        _switch(config)
        stack.append((id(module), config))


def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Hook after `forward`, also after one that failed."""
    if torch.compiler.is_compiling():
        if _ours(args, kwargs) and not _inside(args, kwargs):
            config = text_config(module)
            config._attn_implementation_internal = _BASES.get(
                config._attn_implementation, config._attn_implementation
            )
    elif _running.stack and _running.stack[-1][0] == id(module):
        _leave(len(_running.stack) - 1)


def _leave(depth: int) -> None:
    """End the innermost passes of this thread, down to `depth`."""
    while len(_running.stack) > depth:
        config = _running.stack.pop()[1]
        with _lock:
            entry = _switched[id(config)]
            entry[1] -= 1
            if entry[1] == 0:
                del _switched[id(config)]
                name = config._attn_implementation
                config._attn_implementation_internal = _BASES.get(name, name)


def _switch(config: Any) -> None:
    with _lock:
        name = config._attn_implementation
        if name not in _BASES:
            check_name(name)
            config._attn_implementation_internal = NAMES[name]
        _switched.setdefault(id(config), [config, 0])[1] += 1


def check_name(name: str | None) -> None:
    """Raise UnsupportedModelError unless this cache can take the place of an attention implementation."""
    if name not in NAMES and name not in _BASES:
        raise UnsupportedModelError(
            f"attention implementation {name!r} is not supported; load the model with "
            f"attn_implementation set to one of {', '.join(NAMES)}"
        )
