"""`generate`: `model.generate` with a cache of its own."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from ...config import SelfIndexConfig
from ...errors import InputError
from .cache import SelfIndexCache
from .models import cache_argument


def generate(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    *,
    cache: SelfIndexCache | None = None,
    **options: Any,
) -> Any:
    """Call `model.generate` with a `SelfIndexCache`.

    Args:
        input_ids: int64 [B, T], including what `cache` holds already, as for `model.generate`.
        cache: filled or empty; None makes one.
        options: fields of `SelfIndexConfig` for the cache that is made; all others are those of
            `model.generate` and mean what they mean there.
    Returns:
        what `model.generate` returns.

    Raises:
        InputError: options of a new cache beside a given one.
        ConfigError, UnsupportedModelError: as `SelfIndexCache`.
    """
    fields = SelfIndexConfig.__dataclass_fields__
    own = {name: options.pop(name) for name in list(options) if name in fields}
    if cache is None:
        cache = SelfIndexCache(model, **own)
    elif own:
        raise InputError(f"options of a new cache ({', '.join(own)}) do not fit a given one")
    return cast(Any, model).generate(input_ids, **{cache_argument(model): cache}, **options)
