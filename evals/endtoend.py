"""Teacher-forced comparison of a model with a variant in place of its attention.

The continuation runs again as one block. Attention of the full-attention layers over the prefix
is the variant's; the continuation's own tokens stay exact.
"""

from __future__ import annotations

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


class _Simulated:
    """A layer's attention under a variant; `read` is the share of the encoded tokens per query, [T]."""

    def __init__(self, prefix: Prefix, variant: Variant) -> None:
        self.prefix, self.variant, self.read = prefix, variant, torch.empty(0)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """The whole continuation [1, Hq, T, d]; returns [1, T, Hq, d]."""
        got = attend(query[0], self.prefix, keys[0], values[0], scaling, self.variant)
        self.read = got.selected.float().mean((0, 2))
        return got.out.flatten(0, 1).transpose(0, 1)[None].contiguous()


@torch.no_grad()
def compare(model: Any, record: Record, variant: Variant, prefixes: dict[int, Prefix]) -> dict[str, Array]:
    """Per token of the continuation: KL(dense || variant), top-1 agreement, loss difference, and
    the share of encoded tokens that it read, over all layers and heads.
    """
    attentions = {i: _Simulated(prefix, variant) for i, prefix in prefixes.items()}
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
