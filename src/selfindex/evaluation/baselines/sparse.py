"""Caches that keep keys and values in 16 bits and read, or keep, few of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import RECENT, Stored, full_precision, top_tokens


@dataclass
class Sparse:
    """Base: exact keys and values; `budget` is a share of the prefix's tokens."""

    selects: ClassVar[bool] = True
    budget: float

    def store(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Stored:
        return Stored(keys, values, full_precision(keys.shape[1]))

    def count(self, tokens: int) -> int:
        """Tokens selected of a prefix."""
        return math.ceil(self.budget * tokens)

    def bytes_per_token(self, head_dim: int) -> float:
        return 4 * head_dim

    def bytes_read(self, head_dim: int) -> float:
        # What is kept beside keys and values is the index, which is read whole.
        return 4 * head_dim * self.budget + self.bytes_per_token(head_dim) - 4 * head_dim


class Oracle(Sparse):
    """The tokens with the most true softmax mass, summed over the query heads of a KV head.

    Not a system: it reads every key to find out which ones to read.
    """

    def bytes_read(self, head_dim: int) -> float:
        return 2 * head_dim + 4 * head_dim * self.budget

    def select(self, stored: Stored, query: Tensor, scaling: float) -> Tensor:
        logits = query @ stored.keys[:, None].float().mT * scaling
        exact = stored.exact.to(query.device)
        mass = logits.masked_fill(exact, -torch.inf).softmax(-1).sum(1)
        return top_tokens(mass, self.count(mass.shape[-1]), exact)


@dataclass
class Quest(Sparse):
    """Quest (Tang et al., arXiv 2406.10774): whole pages by an upper bound on q.k.

    A page keeps the minimum and maximum of every key channel; its score is the sum over channels
    of max(q min, q max). The publication selects per query head; with grouped queries the heads
    of a group read the same pages here, chosen by their mean bound.
    """

    page: int = 16

    def store(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Stored:
        missing = -keys.shape[1] % self.page
        # The last page repeats its last key, which changes neither bound.
        padded = torch.cat((keys, keys[:, -1:].expand(-1, missing, -1)), 1).unflatten(1, (-1, self.page))
        return Stored(keys, values, full_precision(keys.shape[1]), index=(padded.amin(2), padded.amax(2)))

    def select(self, stored: Stored, query: Tensor, scaling: float) -> Tensor:
        low, high = (bound.float() for bound in stored.index)  # [H, pages, d]
        # max(q a, q b) with a <= b: the positive part of q meets b, the negative one a.
        bound = query.clamp(min=0) @ high[:, None].mT + query.clamp(max=0) @ low[:, None].mT
        n = stored.keys.shape[1]
        score = bound.mean(1)  # [H, T, pages]
        nearly = stored.exact.to(query.device)
        whole = F.pad(nearly, (0, -n % self.page), value=True).view(-1, self.page).all(1)
        pages = top_tokens(score, round(self.count(n) / self.page), whole)
        return pages.repeat_interleave(self.page, -1)[..., :n]

    def bytes_per_token(self, head_dim: int) -> float:
        return 4 * head_dim + 2 * 2 * head_dim / self.page


@dataclass
class DoubleSparse(Sparse):
    """Double Sparsity (Yang et al., arXiv 2408.07092): score tokens by a few heavy channels.

    The channels with the largest mean |q k| are kept beside the cache in 16 bits. The publication
    finds them offline; here they come from the prefix itself, which can only help it.
    """

    channels: float = 1 / 8

    def store(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Stored:
        heads, _, dim = keys.shape
        weight = query.unflatten(0, (heads, -1)).abs().mean((1, 2)) * keys.abs().mean(1)  # [H, d]
        heavy = weight.topk(round(dim * self.channels), -1).indices
        label = keys.gather(2, heavy[:, None].expand(-1, keys.shape[1], -1))
        return Stored(keys, values, full_precision(keys.shape[1]), index=(heavy, label))

    def select(self, stored: Stored, query: Tensor, scaling: float) -> Tensor:
        heavy, label = stored.index
        part = query.gather(3, heavy[:, None, None].expand(*query.shape[:3], -1))
        exact = stored.exact.to(query.device)
        logits = (part @ label[:, None].float().mT * scaling).masked_fill(exact, -torch.inf)
        score = logits.softmax(-1).sum(1)
        return top_tokens(score, self.count(score.shape[-1]), exact)

    def bytes_per_token(self, head_dim: int) -> float:
        return 4 * head_dim + 2 * round(head_dim * self.channels)


def snapkv_votes(query: Tensor, keys: Tensor, scaling: float, kernel: int = 7) -> Tensor:
    """Softmax mass [H, n] of the last queries [Hq, T, d] on keys [H, n, d], max-pooled over neighbours."""
    heads, n, _ = keys.shape
    last = query.unflatten(0, (heads, -1))
    logits = last @ keys[:, None].mT * scaling  # [H, G, T, n]
    at = torch.arange(n, device=keys.device)
    future = at > at[n - last.shape[2] :, None]
    votes = logits.masked_fill(future, -torch.inf).softmax(-1).sum((1, 2))
    return F.max_pool1d(votes, kernel, stride=1, padding=kernel // 2)


@dataclass
class SnapKV(Sparse):
    """SnapKV (Li et al., arXiv 2404.14469): evict what the prompt's last queries do not look at.

    The votes of the last `window` queries are max-pooled over 7 neighbours; the best tokens and
    the window are kept, everything else is gone. Heads of a group vote together.
    """

    selects: ClassVar[bool] = False
    window: int = 32
    kernel: int = 7

    def store(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Stored:
        n, votes = keys.shape[1], snapkv_votes(query[:, -self.window :], keys, scaling, self.kernel)
        exact = full_precision(n).to(keys.device)
        kept = top_tokens(votes, self.count(n), exact) | exact
        return Stored(keys, values, full_precision(n), kept=kept)

    def select(self, stored: Stored, query: Tensor, scaling: float) -> None:
        return None

    def bytes_per_token(self, head_dim: int) -> float:
        return 4 * head_dim * self.budget

    def bytes_read(self, head_dim: int) -> float:
        return self.bytes_per_token(head_dim)


class StreamingLLM(Sparse):
    """StreamingLLM (Xiao et al., arXiv 2309.17453): a few sinks and the most recent tokens.

    Positions stay as they are (the publication renumbers them within the window).
    """

    selects = False

    def store(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Stored:
        n = keys.shape[1]
        kept = full_precision(n, recent=self.count(n) + RECENT)
        return Stored(keys, values, full_precision(n), kept=kept.to(keys.device).expand(keys.shape[0], -1))

    def select(self, stored: Stored, query: Tensor, scaling: float) -> None:
        return None

    def bytes_per_token(self, head_dim: int) -> float:
        return 4 * head_dim * self.budget

    def bytes_read(self, head_dim: int) -> float:
        return self.bytes_per_token(head_dim)
