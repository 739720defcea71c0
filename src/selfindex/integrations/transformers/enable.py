"""`enable`: use the cache in code that does not build its own."""

from __future__ import annotations

import inspect
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ...config import SelfIndexConfig
from .cache import SelfIndexCache
from .models import cache_argument, plan_layers
from .passes import given_cache, text_models
from .prepare import prepare
from .wrappers import unwrap

_MAKER = "_prepare_cache_for_generation"
"""Method of transformers' that makes the cache of a `generate` call, where all its options are known."""


class _CacheMaker:
    """Stands in for that method of one model; others of its class are untouched.

    A copy of the model, and the model after `disable`, does what it did before.
    """

    def __init__(self, model: Any, before: Any = None) -> None:
        # Without a reference to the model, which would keep itself alive.
        self._model, self.before = weakref.ref(model), before

    def __call__(self, config: GenerationConfig, arguments: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        assert model is not None
        before = self.before or getattr(type(model), _MAKER).__get__(model)
        if model not in _enabled:
            return before(config, arguments, *args, **kwargs)
        enabled = _enabled[model].users[-1]
        enabled._serve_generate(config, arguments)
        found = before(config, arguments, *args, **kwargs)
        # Forward passes of this call need not say again what has been said.
        enabled._known.update(x for x in arguments.values() if isinstance(x, Cache))
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> _CacheMaker:
        model = self._model()
        return _CacheMaker(memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model(), _MAKER)


class _Uses:
    """Where a module is enabled, innermost last, and what was installed for that."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.users: list[Enabled] = []
        # Before the hook that looks for a cache among the arguments.
        self._hook = module.register_forward_pre_hook(_before_forward, prepend=True, with_kwargs=True)
        self._maker: _CacheMaker | None = None
        if hasattr(module, _MAKER):
            self._maker = _CacheMaker(module, vars(module).get(_MAKER))
            vars(module)[_MAKER] = self._maker

    def remove(self, module: PreTrainedModel) -> None:
        self._hook.remove()
        # What somebody put over it since stays, and goes through to what was there before.
        maker = self._maker
        if maker is not None and id(vars(module).get(_MAKER)) == id(maker):
            before = maker.before
            del vars(module)[_MAKER]
            if before is not None:
                vars(module)[_MAKER] = before


_enabled: weakref.WeakKeyDictionary[nn.Module, _Uses] = weakref.WeakKeyDictionary()


def _before_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hook before `forward`. It has no state and no reference to the model, so that copies work."""
    if torch.compiler.is_compiling() and (given_cache(args, kwargs) is not None or torch.is_grad_enabled()):
        return None
    return _serve_forward(module, args, kwargs)


@torch.compiler.disable
def _serve_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    return _enabled[module].users[-1]._serve_forward(module, args, kwargs) if module in _enabled else None


class Enabled:
    """What `enable` returns: undo with `disable()`, or use it as a context manager.

    Attributes:
        model: the model itself, without what it was wrapped in.
        cache: the cache of the latest `generate` or forward call; None before the first.
    """

    def __init__(self, model: PreTrainedModel, config: SelfIndexConfig) -> None:
        self.model, self.config = unwrap(model), config
        plan_layers(self.model, config)  # refuse early
        self.cache: SelfIndexCache | None = None
        self._said: set[str] = set()
        self._known: weakref.WeakSet[Cache] = weakref.WeakSet()
        self._undo = prepare(self.model)
        self._modules = list(text_models(self.model))
        for module in self._modules:
            if module not in _enabled:
                _enabled[module] = _Uses(module)
            _enabled[module].users.append(self)

    def _new_cache(self) -> SelfIndexCache:
        self.cache = SelfIndexCache(self.model, self.config, _prepare=False)
        return self.cache

    def _say(self, reason: str) -> None:
        """Compression that is off says so, once for each reason."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"selfindex.enable does not compress here: {reason}", RuntimeWarning, stacklevel=2)

    def _say_other(self, cache: Cache) -> None:
        if not isinstance(cache, SelfIndexCache) and cache not in self._known:
            self._say(f"the model was given a {type(cache).__name__}, which is used as it is")

    def _serve_generate(self, config: GenerationConfig, arguments: dict[str, Any]) -> None:
        """Give a `generate` call a cache where it would make one of its own."""
        name = cache_argument(self.model)
        if arguments.get(name) is not None:
            self._say_other(arguments[name])
        elif config.use_cache is False:
            self._say("generate runs with use_cache=False, from its arguments or a generation config")
        elif config.cache_implementation not in (None, "dynamic"):
            self._say(f"generate runs with cache_implementation={config.cache_implementation!r}")
        else:
            config.cache_implementation = None  # the call's own copy; transformers wants one of the two
            arguments[name] = self._new_cache()

    def _serve_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give a forward call a cache where the model would make one of its own."""
        cache = given_cache(args, kwargs)
        if cache is not None:
            self._say_other(cache)
            return None
        places = list(inspect.signature(module.forward).parameters)
        named = dict(zip(places, args, strict=False)) | kwargs
        use = named.get("use_cache")
        if use is None:
            use = self.model.config.get_text_config(decoder=True).use_cache
        if not use:
            return None
        if torch.is_grad_enabled():
            # A training step may use any part of what the model returns.
            if not module.training:
                self._say("gradients are enabled; run the model under torch.no_grad()")
            return None
        name = cache_argument(self.model)
        # A None at its place, or under the name it had before transformers 5.24, makes room.
        kwargs = {k: x for k, x in kwargs.items() if k not in ("cache", "past_key_values")}
        if places.index(name) < len(args):
            at = places.index(name)
            return (*args[:at], self._new_cache(), *args[at + 1 :]), kwargs
        return args, kwargs | {name: self._new_cache()}

    def disable(self) -> None:
        """Put the model back as it was; other uses of `enable`, around this one or inside, go on."""
        while self._modules:
            module = self._modules.pop()
            uses = _enabled[module]
            uses.users.remove(self)
            if not uses.users:
                uses.remove(module)
                del _enabled[module]
        self._undo()

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()


def enable(model: PreTrainedModel, config: SelfIndexConfig | None = None, **options: Any) -> Enabled:
    """Make a model use a `SelfIndexCache` wherever it would have made a cache of its own.

    Covers `generate`, pipelines and plain forward calls with `use_cache`. A cache that the caller
    passes is left alone, and so are forward calls with gradients, which run as they would without
    it. Where that means that nothing is compressed, a warning says so once. Of several uses at the
    same time, the one that began last applies.

    Args:
        model: a transformers decoder of a supported family, or a wrapper around one (PEFT,
            torch.compile, data parallel).
        options: fields of `SelfIndexConfig`.

    Raises:
        ConfigError, UnsupportedModelError: as `SelfIndexCache`; the model is as it was then.

    Example:
        >>> with selfindex.enable(model, budget=0.05):
        ...     pipe("A long document ...")
    """
    return Enabled(model, SelfIndexConfig.make(config, **options))
