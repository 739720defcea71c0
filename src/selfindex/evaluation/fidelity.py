"""How close a model stays to itself over another cache: KL, agreement, perplexity of a real text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..integrations.transformers.models import cache_argument
from .stats import Array, bootstrap


@torch.inference_mode()
def continue_from(model: Any, cache: Any, ids: Tensor, **options: Any) -> Tensor:
    """Log-probabilities [T, vocabulary] of the tokens after each of ids [1, T], teacher-forced.

    The cache takes the tokens. `options` are the forward pass's.
    """
    return (
        model(ids, use_cache=True, **{cache_argument(model): cache}, **options)
        .logits[0]
        .float()
        .log_softmax(-1)
    )


def compare(dense: Tensor, other: Tensor, targets: Tensor) -> dict[str, Array]:
    """Per-token KL(dense || other), top-1 agreement and negative log-likelihood of the text."""
    kl = (dense.exp() * (dense - other)).sum(-1)
    same = dense.argmax(-1) == other.argmax(-1)
    nll = -other.gather(1, targets[:, None])[:, 0]
    return {name: x.double().cpu().numpy() for name, x in (("kl", kl), ("top1", same), ("nll", nll))}


def summarise(runs: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Pool runs over texts: estimate and interval per metric, worst text for KL and top-1."""
    table: dict[str, dict[str, Any]] = {}
    for name in runs[0]:
        windows = {metric: [run[name][metric] for run in runs] for metric in ("kl", "top1", "nll")}
        table[name] = {metric: bootstrap(parts) for metric, parts in windows.items()}
        table[name]["perplexity"] = math.exp(table[name]["nll"][0])
        table[name]["kl_by_text"] = [round(float(part.mean()), 5) for part in windows["kl"]]
        table[name]["top1_by_text"] = [round(float(part.mean()), 5) for part in windows["top1"]]
        if "bytes" in runs[0][name]:
            table[name]["bytes"] = runs[0][name]["bytes"]
    return table
