"""Teacher-forced comparison of a model with a variant in place of its attention.

The continuation runs again as one block. Attention of the full-attention layers over the prefix
is the variant's; the continuation's own tokens stay exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfindex.evaluation import fidelity
from selfindex.evaluation.cache_layers import ReplacedCache
from selfindex.evaluation.stats import Array
from selfindex.integrations.transformers.models import cache_argument

from .budgets import Budgets, spread
from .capture import Record
from .compensation import calibrate
from .operator_level import Balances, balance_of
from .sparse import Prefix, Variant, attend, encode


@torch.no_grad()
def encode_record(
    record: Record, variant: Variant, kinds: Balances, other: Budgets | None = None
) -> dict[int, Prefix]:
    """The encoded prefix of every recorded layer; `other` are budgets from another text."""
    first = min(record.layers)
    out: dict[int, Prefix] = {}
    for i, layer in record.layers.items():
        prefix = encode(layer, variant, balance_of(kinds, variant, i))
        out[i] = calibrate(layer, prefix, variant, first=i == first)
    return spread(record, out, variant, other)


class Simulated:
    """A layer's attention under a variant.

    Args:
        question: the first so many tokens of the continuation read everything.

    Attributes:
        read: the share of the encoded tokens that every query of the last call read, [T].
    """

    def __init__(self, prefix: Prefix, variant: Variant, question: int = 0) -> None:
        self.prefix, self.variant, self.question, self.read = prefix, variant, question, torch.empty(0)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """The whole continuation [1, Hq, T, d]; returns [1, T, Hq, d]."""
        positions = torch.arange(query.shape[2])
        parts = []
        everything = replace(self.variant, budget=1.0)
        for at, variant in (
            (positions[: self.question], everything),
            (positions[self.question :], self.variant),
        ):
            if len(at):
                of = query[0, :, at], self.prefix, keys[0], values[0], scaling, variant
                parts.append(attend(*of, positions=at))
        self.read = torch.cat([part.selected.float().mean((0, 2)) for part in parts])
        return torch.cat([part.out for part in parts], 2).flatten(0, 1).transpose(0, 1)[None].contiguous()


def compare(model: Any, record: Record, variant: Variant, prefixes: dict[int, Prefix]) -> dict[str, Array]:
    """Per token of the continuation: KL(dense || variant), top-1 agreement, loss difference, and
    the share of encoded tokens that it read, over all layers and heads.
    """
    return run(model, record, {i: Simulated(prefix, variant) for i, prefix in prefixes.items()})


@torch.no_grad()
def run(model: Any, record: Record, attentions: dict[int, Simulated]) -> dict[str, Array]:
    """The metrics of `compare`, of layers that may differ."""
    cache = ReplacedCache(model, attentions, record.cache)
    ids = record.ids[None, record.prefix :]
    logits = model(ids, use_cache=True, **{cache_argument(model): cache}).logits[0]
    read = [attention.read for attention in attentions.values()]
    metrics = compare_logits(record.logits, logits, record.ids[record.prefix :])
    return metrics | {"read": torch.stack(read).mean(0).cpu().numpy().astype(np.float64)}


def compare_logits(dense: Tensor, other: Tensor, ids: Tensor) -> dict[str, Array]:
    """The metrics of `compare` from two sets of logits [T, vocab]."""
    following = torch.cat([ids[1:], ids[-1:]])
    dense, other = dense.log_softmax(-1), other.log_softmax(-1)
    found = fidelity.compare(dense, other, following)
    loss_rise = found.pop("nll") - fidelity.compare(dense, dense, following)["nll"]
    loss_rise[-1] = 0.0  # its next token is not known
    return found | {"loss": loss_rise}
