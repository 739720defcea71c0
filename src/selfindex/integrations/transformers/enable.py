"""`enable`: use the cache in code that does not build its own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ...config import SelfIndexConfig
from .attention import prepare
from .cache import SelfIndexCache
from .models import cache_argument, plan_layers


class Enabled:
    """What `enable` returns: undo with `disable()`, or use it as a context manager.

    Attributes:
        cache: the cache of the latest `generate` or forward call; None before the first.
    """

    def __init__(self, model: PreTrainedModel, config: SelfIndexConfig) -> None:
        plan_layers(model, config)  # refuse early
        self.model, self.config = model, config
        self.cache: SelfIndexCache | None = None
        self._name = cache_argument(model)
        self._restore = prepare(model)
        self._generate: Any = model.generate
        # On the instance, so that other models of the class are untouched.
        model.__dict__["generate"] = self._generate_with_cache
        self._hook = model.register_forward_pre_hook(self._give_cache, with_kwargs=True)

    def _new_cache(self) -> SelfIndexCache:
        self.cache = SelfIndexCache(self.model, self.config)
        return self.cache

    def _generate_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        chosen = any(kwargs.get(k) is not None for k in ("cache", "past_key_values", "cache_implementation"))
        if not chosen and kwargs.get("use_cache", True):
            kwargs[self._name] = self._new_cache()
        return self._generate(*args, **kwargs)

    def _give_cache(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        given = any(kwargs.get(k) is not None for k in ("cache", "past_key_values"))
        use = kwargs.get("use_cache")
        if not given and (model.config.use_cache if use is None else use):
            kwargs[self._name] = self._new_cache()
        return args, kwargs

    def disable(self) -> None:
        """Put the model back as it was."""
        self._hook.remove()
        self.model.__dict__.pop("generate", None)
        self._restore()

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()


def enable(model: PreTrainedModel, config: SelfIndexConfig | None = None, **options: Any) -> Enabled:
    """Make a model use a `SelfIndexCache` wherever it would have made a cache of its own.

    Covers `generate`, pipelines and plain forward calls with `use_cache`. A cache that the caller
    passes is left alone.

    Args:
        options: fields of `SelfIndexConfig`.

    Raises:
        ConfigError, UnsupportedModelError: as `SelfIndexCache`.

    Example:
        >>> with selfindex.enable(model, budget=0.05):
        ...     pipe("A long document ...")
    """
    return Enabled(model, SelfIndexConfig.make(config, **options))
