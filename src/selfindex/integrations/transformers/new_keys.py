"""What a layer of this cache gives a model in the place of keys."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from ...errors import StateError


class NewKeys:
    """Stands in for the key tensor between the cache's `update` and the attention function.

    Models pass it through untouched. Anything that treats it as a tensor is an attention
    implementation that was not prepared, and gets a clear error.
    """

    def __init__(self, layer: Any, keys: Tensor, values: Tensor) -> None:
        self.layer, self.new_keys, self.new_values = layer, keys, values

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._misused()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        cls._misused()

    @staticmethod
    def _misused() -> NoReturn:
        raise StateError(
            "a SelfIndexCache reached a model that was not prepared for it: build the cache with "
            "SelfIndexCache(model), and call the model itself, not its forward method"
        )
