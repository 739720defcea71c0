"""Layers that hold no more with every token, as plain tensors and numbers, and back: what is written to disk.

The cache leaves them as transformers has them: a sliding window is its last tokens, a linear-attention
layer its convolution and recurrent states. A block can have such a state beside compressed keys.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from ...errors import FormatError, StateError
from .layer import SelfIndexLayer


def holds(layer: Any) -> bool:
    """Whether a layer has more to it than compressed tokens."""
    window = isinstance(layer, CacheLayerMixin) and not isinstance(layer, SelfIndexLayer)
    return window or isinstance(layer, LinearAttentionCacheLayerMixin)


def export(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a layer holds beside compressed tokens: (tensors by name, JSON-able numbers).

    A past that is recorded for `crop` is left out, as transformers drops it then.

    Raises:
        StateError: a layer of a kind that is not known.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    if isinstance(layer, DynamicSlidingWindowLayer):
        keys, values = cast(Tensor, layer.keys), cast(Tensor, layer.values)
        first = 1 - layer.sliding_window
        tensors |= {"keys": keys[:, :, first:], "values": values[:, :, first:]}
    elif isinstance(layer, CacheLayerMixin) and not isinstance(layer, SelfIndexLayer):
        raise StateError(f"a cache with layers of the kind {type(layer).__name__} cannot be saved")
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for i, width in layer.conv_kernel_size.items():
            conv, recurrent = layer.conv_states[i], layer.recurrent_states[i]
            if layer.is_conv_states_initialized[i] and conv is not None and width is not None:
                # A recorded past is longer, which a padding below zero cuts, or of few tokens and shorter.
                tensors[f"conv_state_{i}"] = nn.functional.pad(conv, (width - conv.shape[-1], 0))
            if layer.is_recurrent_states_initialized[i] and recurrent is not None:
                tensors[f"recurrent_state_{i}"] = recurrent
        numbers["has_state"] = [bool(x) for x in layer.has_previous_state.values()]
    return tensors, numbers


@torch.inference_mode(False)
@torch.no_grad()
def restore(
    layer: Any, tensors: dict[str, Tensor], numbers: dict[str, Any], batch: int, columns: int
) -> None:
    """Fill an empty layer with what `export` gave.

    Raises:
        FormatError: tensors and numbers do not fit each other or the layer.
    """
    if not all(x.is_floating_point() and x.ndim > 1 and x.shape[0] == batch for x in tensors.values()):
        raise FormatError(f"a window or state is not of {batch} rows")
    rest = dict(tensors)
    if isinstance(layer, DynamicSlidingWindowLayer):
        _restore_window(layer, rest.pop("keys", None), rest.pop("values", None), columns)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        _restore_states(layer, rest, numbers.get("has_state"))
    if rest:
        raise FormatError(f"a {type(layer).__name__} does not hold {sorted(rest)}")


def _restore_window(
    layer: DynamicSlidingWindowLayer, keys: Tensor | None, values: Tensor | None, columns: int
) -> None:
    # A window of one token keeps all of them in transformers.
    held = columns if layer.sliding_window == 1 else min(columns, layer.sliding_window - 1)
    shapes = [None if x is None else tuple(x.shape) for x in (keys, values)]
    if keys is None or values is None or shapes[0] != shapes[1] or keys.ndim != 4 or keys.shape[2] != held:
        raise FormatError(f"a sliding window of {held} tokens has keys and values of shapes {shapes}")
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys.clone(), values.clone()  # read in inference mode, they could not change
    layer.cumulative_length = columns


def _restore_states(layer: LinearAttentionCacheLayerMixin, tensors: dict[str, Tensor], begun: Any) -> None:
    count = layer.number_of_states
    if not isinstance(begun, list) or len(begun) != count or any(type(x) is not bool for x in begun):
        raise FormatError(f"{count} states of a layer are said to have begun: {begun}")
    for i in range(count):
        conv, recurrent = tensors.pop(f"conv_state_{i}", None), tensors.pop(f"recurrent_state_{i}", None)
        # Each by itself, as models do: one call with both is not for every kind of layer.
        if conv is not None:
            layer.lazy_initialization(conv_states=conv, state_idx=i)
            layer.conv_states[i].copy_(conv)  # type: ignore[union-attr]
        if recurrent is not None:
            layer.lazy_initialization(recurrent_states=recurrent, state_idx=i)
            layer.recurrent_states[i].copy_(recurrent)  # type: ignore[union-attr]
        layer.has_previous_state[i] = begun[i]
