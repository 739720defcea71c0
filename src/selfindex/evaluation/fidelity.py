"""How close a model stays to itself over another cache: KL, agreement, perplexity of a real text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..integrations.transformers.models import cache_argument

if TYPE_CHECKING:
    from .stats import Array


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


def divergence(dense: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Per token, of log-probabilities [T, vocabulary]: KL(dense || other) in nats, and top-1 agreement."""
    return (dense.exp() * (dense - other)).sum(-1), dense.argmax(-1) == other.argmax(-1)


def compare(dense: Tensor, other: Tensor, targets: Tensor) -> dict[str, Array]:
    """`divergence`, and the negative log-likelihood of the text; `targets` [T] are its next tokens."""
    kl, same = divergence(dense, other)
    nll = -other.gather(1, targets[:, None])[:, 0]
    return {name: x.double().cpu().numpy() for name, x in (("kl", kl), ("top1", same), ("nll", nll))}
