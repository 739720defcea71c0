"""Run a dense model over a prefix and a continuation, and keep what attention saw.

An attention function registered with transformers passes every call to the active handler;
without one, and for layers with a sliding window, it is plain SDPA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from selfindex.evaluation.texts import excerpt, load_text

from .models import full_attention_layers

HOOK = "selfindex_evals_hook"
BALANCE_WINDOWS = (256, 512, 1024)
TAIL = 64  # last queries of the prefix that are kept

# handler(layer, query [Hq, T, d], key [H, N, d], value, scaling) -> output [Hq, T, d] or None
Handler = Callable[[int, Tensor, Tensor, Tensor, float], "Tensor | None"]
_active: list[tuple[frozenset[int], Handler]] = []


def _hook(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
) -> tuple[Tensor, None]:
    if _active and module.layer_idx in _active[-1][0]:
        scaling = kw.get("scaling") or query.shape[-1] ** -0.5
        out = _active[-1][1](module.layer_idx, query[0], key[0], value[0], float(scaling))
        if out is not None:
            return out.transpose(0, 1)[None].contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kw)


AttentionInterface.register(HOOK, _hook)
AttentionMaskInterface.register(HOOK, sdpa_mask)


@contextmanager
def handler(layers: list[int], function: Handler) -> Iterator[None]:
    """Within the block, attention of `layers` goes to `function` (None: compute densely)."""
    _active.append((frozenset(layers), function))
    try:
        yield
    finally:
        _active.pop()


@dataclass
class LayerRecord:
    """One layer: post-RoPE tensors of one sequence."""

    k: Tensor  # [H, P, d] keys of the prefix
    v: Tensor
    new_k: Tensor  # [H, T, d] keys of the continuation
    new_v: Tensor
    q: Tensor  # [Hq, T, d] queries of the continuation
    q_tail: Tensor  # [Hq, TAIL, d] last queries of the prefix
    q_sq: dict[int, Tensor]  # window (0 = whole prefix) -> [Hq, d] mean square of the queries
    scaling: float


@dataclass
class Record:
    """One window of one text under one model."""

    text: str
    ids: Tensor  # [P + T]
    prefix: int
    logits: Tensor  # [T, vocab] of the dense model
    layers: dict[int, LayerRecord] = field(default_factory=dict)
    cache: Any = None  # dense cache after the prefix


def _window_ids(tokenizer: Any, text: str, part: int, parts: int, length: int) -> Tensor:
    ids = tokenizer(excerpt(text, part, parts, 12 * length), return_tensors="pt").input_ids[0]
    if ids.numel() < length:
        raise ValueError(f"the text gives {ids.numel()} tokens, {length} are needed")
    return ids[:length]


@torch.no_grad()
def record(model: Any, ids: Tensor, prefix: int, text: str) -> Record:
    """Dense pass over ids[:prefix], then over the rest as one block."""
    layers = full_attention_layers(model)
    ids = ids.to(model.device)
    store: dict[int, dict[str, Any]] = {i: {} for i in layers}

    def on_prefix(i: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> None:
        square = q.square()
        stats = {w: square[:, :w].mean(1) for w in BALANCE_WINDOWS}
        stats[0] = square.mean(1)
        store[i].update(q_tail=q[:, -TAIL:].clone(), q_sq=stats, scaling=scaling)

    def on_block(i: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> None:
        store[i].update(q=q.clone(), new_k=k[:, prefix:].clone(), new_v=v[:, prefix:].clone())

    cache = DynamicCache(config=model.config)
    with handler(layers, on_prefix):
        model(ids[None, :prefix], cache=cache, use_cache=True, logits_to_keep=1)
    with handler(layers, on_block):
        logits = model(ids[None, prefix:], cache=copy.deepcopy(cache), use_cache=True).logits[0]
    for i in layers:
        store[i].update(k=cache.layers[i].keys[0], v=cache.layers[i].values[0])
    records = {i: LayerRecord(**store[i]) for i in layers}
    return Record(text, ids, prefix, logits, records, cache)


def load_record(
    loaded: Callable[[], tuple[Any, Any]],
    model_name: str,
    text: str,
    part: int,
    parts: int,
    prefix: int,
    block: int,
    store: Path | None,
) -> Record:
    """`record` for a window of a named text, kept in the directory `store` if one is given."""
    name = f"{model_name}-{text}-{part}of{parts}-{prefix}+{block}.pt".replace("/", "_")
    if store is not None and (store / name).exists():
        result: Record = torch.load(store / name, weights_only=False)
        return result
    model, tokenizer = loaded()
    ids = _window_ids(tokenizer, load_text(text), part, parts, prefix + block)
    result = record(model, ids, prefix, text)
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
        torch.save(result, store / name)
    return result
