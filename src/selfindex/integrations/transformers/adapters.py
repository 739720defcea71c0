"""Which PEFT adapters act in a model, without importing PEFT."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from ...errors import StateError

INNER = ("base_layer", "original_module", "token_adapter", "_orig_mod")
"""Children that a wrapper stands for: PEFT's layers, and a compiled module."""


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether PEFT wrapped a module here; the model itself only has methods of these names."""
    return isinstance(getattr(type(module), "disable_adapters", None), property)


def acting(layer: Any) -> list[str]:
    """Adapters that a layer of PEFT applies on top of its weights; merged ones are in the weights."""
    return [] if layer.disable_adapters or layer.merged_adapters else list(layer.active_adapters)


def parts(layer: nn.Module, adapter: str) -> dict[str, Any]:
    """What a layer keeps for an adapter, by attribute: modules, tensors, numbers such as its scaling."""
    tables = {name: x for name, x in (vars(layer) | layer._modules).items() if not name.startswith("_")}
    return {name: x[adapter] for name, x in sorted(tables.items()) if hasattr(x, "keys") and adapter in x}


class ModelState:
    """What a live cache remembers of the state its model was in, to notice a switch of adapters.

    Every step compares the adapters: which of them act in which layer, and with what scaling. A step
    of several tokens also looks for layers that PEFT added since, and for weights written in place.
    Neither reads a weight. Weights that accelerate keeps elsewhere come and go, and are not watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._layers: list[weakref.ref[nn.Module]] = []
        self._adapters: tuple[Any, ...] = ()
        self._writes: int | None = None

    def remember(self) -> None:
        """Take the state of now, for a cache that is being filled."""
        self._find_layers()
        self._adapters, self._writes = self._now(), self._count_writes()

    def check(self, thorough: bool = True) -> None:
        """Compare with the state of now; `thorough`: not just the adapters known so far.

        Raises:
            StateError: the model is in another state than when the cache was filled.
        """
        if thorough:
            self._find_layers()
        now = self._now()
        if now != self._adapters:
            raise StateError(
                f"the cache was filled {_names(self._adapters)}, the model now runs {_names(now)} or with "
                "another scaling, so keys and values would not fit each other. Switch back, or use another "
                "cache"
            )
        if thorough and self._writes is not None and self._count_writes() not in (None, self._writes):
            raise StateError(
                "the model's weights were written since the cache was filled, so keys and values would not "
                "fit each other; call cache.reset() and fill it again"
            )

    def _find_layers(self) -> None:
        model = self._model()
        if model is not None:
            self._layers = [weakref.ref(x) for x in model.modules() if is_adapter_layer(x)]

    def _now(self) -> tuple[Any, ...]:
        found = []
        for reference in self._layers:
            layer = cast(Any, reference())
            if layer is None:
                continue
            names, scaling = acting(layer), vars(layer).get("scaling")
            if names or layer.merged_adapters:
                factors = [scaling.get(x) for x in names] if isinstance(scaling, Mapping) else []
                found.append((id(layer), tuple(names), tuple(layer.merged_adapters), tuple(factors)))
        return tuple(found)

    def _count_writes(self) -> int | None:
        """Writes in place to the weights, as autograd counts them; None where that says nothing."""
        model = self._model()
        weights = [] if model is None else list(model.parameters())
        if not weights or any(x.is_meta or x.is_inference() for x in weights):
            return None
        return sum(x._version for x in weights)


def _names(state: tuple[Any, ...]) -> str:
    names = sorted({name for _, active, merged, _ in state for name in (*active, *merged)})
    return f"with the adapter {', '.join(names)}" if names else "without an adapter"
