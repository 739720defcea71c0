"""Greedy replies over caches that hold a document, or a prompt with its question."""

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


def replies(
    model: Any, tokenizer: Any, cache: Any, samples: Sequence[Sample], following: Tensor
) -> list[list[str]]:
    """The replies of each sample, one a turn, decoded greedily.

    `following` [B] begins the replies of samples whose document holds the question.
    A row stops at its end, its limit, or when its judge has seen enough. In a chat all replies have the
    tokens they may have, so that rows keep in step and their texts stay what the model said.
    """
    if not samples[0].later:
        return [[text] for text in _until_all_end(model, tokenizer, cache, samples, following)]
    found: list[list[str]] = [[] for _ in samples]
    last = torch.empty(len(samples), 0, dtype=torch.long)
    for turn in range(len(samples[0].turns)):
        asked = torch.cat((last, _together([sample.turns[turn].question for sample in samples])), 1)
        known = None if asked.shape[1] else following
        reply = _exactly(greedy(model, cache, asked, known), samples[0].new_tokens)
        last = reply[:, -1:]  # which no pass has read yet
        for row, tokens in enumerate(reply.tolist()):
            found[row].append(tokenizer.decode(tokens, skip_special_tokens=True))
    return found


def _exactly(steps: Iterator[Tensor], tokens: int) -> Tensor:
    return torch.stack([next(steps) for _ in range(tokens)], 1)


def _together(questions: list[list[int]]) -> Tensor:
    return torch.tensor(questions, dtype=torch.long)


def _until_all_end(
    model: Any, tokenizer: Any, cache: Any, samples: Sequence[Sample], following: Tensor
) -> list[str]:
    questions, ends = _together([sample.question for sample in samples]), end_tokens(model)
    produced: list[list[int]] = [[] for _ in samples]
    texts = [""] * len(samples)
    going = set(range(len(samples)))
    for latest in greedy(model, cache, questions, None if questions.shape[1] else following):
        for row in list(going):
            token, sample = int(latest[row]), samples[row]
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
