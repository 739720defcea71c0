"""Greedy replies over caches that were filled before the question was known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .greedy import end_tokens, greedy
from .recording import Recording, record
from .tasks import Sample, score


def read(model: Any, samples: Sequence[Sample]) -> Recording:
    """Prefill the documents of samples of equal length."""
    documents = torch.tensor([sample.document for sample in samples], device=model.device)
    return record(model, documents)


def replies(model: Any, tokenizer: Any, cache: Any, samples: Sequence[Sample]) -> list[str]:
    """One reply a sample, decoded greedily; a row stops at its end, its limit, or with all answers."""
    questions, ends = torch.tensor([sample.question for sample in samples]), end_tokens(model)
    produced: list[list[int]] = [[] for _ in samples]
    texts = [""] * len(samples)
    going = set(range(len(samples)))
    for following in greedy(model, cache, questions):
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
        if not going:
            break
    return texts
