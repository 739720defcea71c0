"""A layer inside a compiled graph: one operator that torch.compile does not look into.

What a layer does depends on what it holds (padding, pages, budgets), in ways that a graph of tensors cannot
express. The operator finds the layer by a number that is a tensor, so that a graph serves every cache.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .new_keys import NewKeys


class Layer(Protocol):
    """What the operator asks of a `SelfIndexLayer`."""

    positions: int
    sparse_prompts: bool
    handle: Tensor

    def accept(self, keys: Tensor, values: Tensor, compiled: bool) -> NewKeys: ...

    def finish(
        self,
        query: Tensor,
        new: NewKeys,
        mask: Tensor | None,
        scaling: float,
        sink_logit: Tensor | None,
        dense: Callable[..., tuple[Tensor, Any]] | None,
        compiled: bool,
    ) -> Tensor: ...


_layers: WeakValueDictionary[int, Layer] = WeakValueDictionary()
_numbers = count()


def register_layer(layer: Layer) -> Tensor:
    """Number a layer: int64 [], on the host."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, device="cpu")


def run_layer(
    layer: Layer,
    query: Tensor,
    new: NewKeys,
    mask: Tensor | None,
    scaling: float,
    sink_logit: Tensor | None,
    dense: Callable[..., tuple[Tensor, Any]],
) -> Tensor:
    """`SelfIndexLayer.attend` while a graph is traced.

    Prompts go through the model's own attention in it, unless they may be read sparsely.
    """
    plain = mask is None or mask.ndim == 2
    prompt = layer.positions == 0 and not (layer.sparse_prompts and plain)
    if prompt:
        output = dense(query, new.new_keys, new.new_values, mask)[0].contiguous()
    else:
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    torch.ops.selfindex.layer(
        output, query, new.new_keys, new.new_values, mask, sink_logit, layer.handle, scaling, prompt
    )
    return output


@torch.library.custom_op("selfindex::layer", mutates_args=("output",), tags=(torch.Tag.cudagraph_unsafe,))
def _layer(
    output: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    sink_logit: Tensor | None,
    handle: Tensor,
    scaling: float,
    prompt: bool,
) -> None:
    """Attend and store in the layer numbered `handle`; a prompt's `output` [B, T, Hq, d] is there already."""
    layer = _layers[int(handle)]
    new = layer.accept(keys, values, compiled=True)
    own = (lambda *_: (output, None)) if prompt else None
    found = layer.finish(query, new, mask, scaling, sink_logit, own, compiled=True)
    if found is not output:
        output.copy_(found)
