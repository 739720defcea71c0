"""Greedy replies over caches that were filled before the question was known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..integrations.transformers.models import cache_argument
from .recording import Recording, record
from .tasks import Sample, score


def read(model: Any, samples: Sequence[Sample]) -> Recording:
    """Prefill the documents of samples of equal length."""
    documents = torch.tensor([sample.document for sample in samples], device=model.device)
    return record(model, documents)


@torch.inference_mode()
def replies(model: Any, tokenizer: Any, cache: Any, samples: Sequence[Sample]) -> list[str]:
    """One reply a sample, decoded greedily; a row stops at its end, its limit, or with all answers."""
    ids = torch.tensor([sample.question for sample in samples], device=model.device)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    produced: list[list[int]] = [[] for _ in samples]
    texts = [""] * len(samples)
    going = set(range(len(samples)))
    while going:
        following = _next(model, cache, ids)
        for row in list(going):
            token = int(following[row])
            if token in ends:
                going.discard(row)
                continue
            produced[row].append(token)
            texts[row] = tokenizer.decode(produced[row], skip_special_tokens=True)
            full = len(produced[row]) >= samples[row].new_tokens
            if full or score(texts[row], samples[row].answers) == 1:
                going.discard(row)
        ids = following[:, None].to(model.device)
    return texts


def _next(model: Any, cache: Any, ids: Tensor) -> Tensor:
    given = {cache_argument(model): cache, "logits_to_keep": 1, "use_cache": True}
    return model(input_ids=ids, **given).logits[:, -1].argmax(-1).cpu()
