"""Looking into a layer while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What one layer did in a forward pass: it has attended, and not yet stored its new tokens.

    Tensors are the layer's own and not to be written to.

    Attributes:
        layer: the cache's layer, which still holds what it held before the pass.
        query: [B, Hq, T, d]; keys, values: [B, H, T, d], the new tokens as the model gave them, post-RoPE.
        scaling: factor on q.k.
        output: [B, T, Hq, d], what the layer returns to the model.
        read: per row, the encoded tokens that each KV head attended to.
    """

    layer: Any
    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    output: Tensor
    read: list[int]


Observer: TypeAlias = Callable[[Observation], None]
"""Called by a layer whose `observer` it is, once a forward pass; what it raises ends the pass."""
