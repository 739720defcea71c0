"""Run a dense model over a prefix and a continuation, and keep what attention saw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from selfindex.evaluation.cache_layers import observe_dense
from selfindex.evaluation.texts import excerpt, load_text
from selfindex.integrations.transformers.observer import Observation

BALANCE_WINDOWS = (256, 512, 1024)
TAIL = 64  # last queries of the prefix that are kept


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
    frequencies: Tensor | None = None  # [d / 2] of RoPE, radians a token


@dataclass
class Record:
    """One window of one text under one model."""

    text: str
    ids: Tensor  # [P + T]
    prefix: int
    logits: Tensor  # [T, vocab] of the dense model
    layers: dict[int, LayerRecord] = field(default_factory=dict)
    cache: Any = None  # dense cache after the prefix


def window_ids(tokenizer: Any, text: str, part: int, parts: int, length: int) -> Tensor:
    """Ids [length] of the beginning of a part of a text."""
    ids = tokenizer(excerpt(text, part, parts, 12 * length), return_tensors="pt").input_ids[0]
    if ids.numel() < length:
        raise ValueError(f"the text gives {ids.numel()} tokens, {length} are needed")
    return ids[:length]


@torch.no_grad()
def record(model: Any, ids: Tensor, prefix: int, text: str) -> Record:
    """Dense pass over ids[:prefix], then over the rest as one block."""
    ids = ids.to(model.device)
    found: dict[int, dict[str, Any]] = {}

    def on_prefix(seen: Observation) -> None:
        square = seen.query[0].square()
        stats = {w: square[:, :w].mean(1) for w in BALANCE_WINDOWS}
        stats[0] = square.mean(1)
        tail = seen.query[0, :, -TAIL:].clone()
        found[seen.layer.layer_idx] = {"q_tail": tail, "q_sq": stats, "scaling": seen.scaling}

    def on_block(seen: Observation) -> None:
        new = {"q": seen.query, "new_k": seen.keys, "new_v": seen.values}
        found[seen.layer.layer_idx] |= {name: x[0].clone() for name, x in new.items()}

    cache = DynamicCache(config=model.config)
    observe_dense(model, cache, ids[None, :prefix], on_prefix, logits_to_keep=1)
    logits = observe_dense(model, copy.deepcopy(cache), ids[None, prefix:], on_block).logits[0]
    held = {i: {"k": cache.layers[i].keys[0], "v": cache.layers[i].values[0]} for i in found}
    frequencies = getattr(getattr(model.base_model, "rotary_emb", None), "inv_freq", None)
    records = {i: LayerRecord(**held[i], **own, frequencies=frequencies) for i, own in found.items()}
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
    ids = window_ids(tokenizer, load_text(text), part, parts, prefix + block)
    result = record(model, ids, prefix, text)
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
        torch.save(result, store / name)
    return result
