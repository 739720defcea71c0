"""The one greedy loop of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..integrations.transformers.models import cache_argument


def greedy(model: Any, cache: Any, ids: Tensor, known: Tensor | None = None) -> Iterator[Tensor]:
    """Most likely tokens after ids [B, T] on top of a cache: int64 [B] on the host, without an end.

    Each costs one forward pass, when it is asked for; the cache holds all but the latest.

    Args:
        known: the first of them, where it is known and T is 0.
    """
    if known is not None:
        yield known
        ids = known[:, None]
    while True:
        with torch.inference_mode():
            given = {cache_argument(model): cache, "logits_to_keep": 1, "use_cache": True}
            following = model(ids.to(model.device), **given).logits[:, -1].argmax(-1).cpu()
        yield following
        ids = following[:, None]


def end_tokens(model: Any) -> set[int]:
    """Tokens after which the model's replies end."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])
