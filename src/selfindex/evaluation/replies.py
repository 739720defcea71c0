"""Greedy replies over caches that were filled before the question was known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .greedy import end_tokens, greedy
from .recording import Recording
from .recording import read as read_ids
from .tasks import Sample


def read(model: Any, samples: Sequence[Sample]) -> Recording:
    """Prefill the documents of samples of equal length."""
    return read_ids(model, torch.tensor([sample.document for sample in samples]))


def replies(model: Any, tokenizer: Any, cache: Any, samples: Sequence[Sample]) -> list[list[str]]:
    """The replies of each sample, one a turn, decoded greedily.

    A row stops at its end, its limit, or when its judge has seen enough. In a chat all replies have the
    tokens they may have, so that rows keep in step and their texts stay what the model said.
    """
    if not samples[0].later:
        return [[text] for text in _until_all_end(model, tokenizer, cache, samples)]
    found: list[list[str]] = [[] for _ in samples]
    last = torch.empty(len(samples), 0, dtype=torch.long)
    for turn in range(len(samples[0].turns)):
        asked = torch.tensor([sample.turns[turn].question for sample in samples])
        reply = _exactly(greedy(model, cache, torch.cat((last, asked), 1)), samples[0].new_tokens)
        last = reply[:, -1:]  # which no pass has read yet
        for row, tokens in enumerate(reply.tolist()):
            found[row].append(tokenizer.decode(tokens, skip_special_tokens=True))
    return found


def _exactly(steps: Iterator[Tensor], tokens: int) -> Tensor:
    return torch.stack([next(steps) for _ in range(tokens)], 1)


def _until_all_end(model: Any, tokenizer: Any, cache: Any, samples: Sequence[Sample]) -> list[str]:
    questions, ends = torch.tensor([sample.question for sample in samples]), end_tokens(model)
    produced: list[list[int]] = [[] for _ in samples]
    texts = [""] * len(samples)
    going = set(range(len(samples)))
    for following in greedy(model, cache, questions):
        for row in list(going):
            token, sample = int(following[row]), samples[row]
            if token in ends:
                going.discard(row)
                continue
            produced[row].append(token)
            texts[row] = tokenizer.decode(produced[row], skip_special_tokens=True)
            full = len(produced[row]) >= sample.new_tokens
            if full or sample.judge.finished(texts[row], sample.answers):
                going.discard(row)
        if not going:
            break
    return texts
