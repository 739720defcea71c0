"""Prompt tokens that each head keeps in full precision, since the prompt's last queries look at them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import ops
from ..codec.votes import choose_pinned
from ..config import SelfIndexConfig
from .change import Change, RowChange

OBSERVED_QUERIES = 32
"""Last queries of a prompt, which vote."""

LONGEST_DRAFT = 128
"""Last tokens of a first chunk that do not count as its prompt where drafts may follow it."""

NEIGHBOURS = 7
"""Tokens that a vote counts for, in "balanced": SnapKV's."""


def _others(chosen: Tensor, tokens: int) -> Tensor:
    """Which of so many tokens are not chosen: [..., c] ascending -> [..., tokens - c] ascending."""
    # The j-th of them comes after as many chosen ones as have at most j others before them.
    count, device = chosen.shape[-1], chosen.device
    before = chosen - torch.arange(count, device=device)
    rest = torch.arange(tokens - count, device=device).expand(*chosen.shape[:-1], -1)
    return rest + torch.searchsorted(before, rest.contiguous(), right=True)


def _last_queries(query: Tensor, heads: int) -> Tensor:
    return query[:, :, -OBSERVED_QUERIES:].unflatten(1, (heads, -1))


def pinned_order(config: SelfIndexConfig, keys: Tensor, query: Tensor, scaling: float) -> Tensor:
    """A prompt's tokens, those in front that stay in full precision: int64 [B, H, n] of places in the prompt.

    First come the sinks, then `config.pinned_tokens` others, then the rest, each in the order of the text.

    Args:
        keys: [B, H, n, d]; query: [B, Hq, n, d], or its last `OBSERVED_QUERIES`.
    """
    heads, tokens = keys.shape[1:3]
    sinks, asking = int(config.sinks), _last_queries(query, heads)
    # The last ones stay in full precision in any case.
    end = tokens - config.recent
    pinned = choose_pinned(keys, asking, config.pinned_tokens, scaling, sinks, end, NEIGHBOURS)
    first = torch.arange(sinks, device=keys.device).expand(*pinned.shape[:2], -1)
    return torch.cat((first, pinned, sinks + _others(pinned - sinks, tokens - sinks)), 2)


@dataclass(frozen=True)
class Pinned:
    """Tokens of every row's prompt of which each head pins some in this chunk, or 0."""

    prompts: tuple[int, ...]

    def noted(self, change: Change) -> Change:
        """A change that remembers them, since nothing inside such a prompt can be taken back."""
        if change.statistics is None or not any(self.prompts):
            return change
        before = change.statistics.prompt_tokens
        prompts = tuple(new or old for new, old in zip(self.prompts, before, strict=True))
        return replace(change, statistics=replace(change.statistics, prompt_tokens=prompts))


def pin(
    config: SelfIndexConfig,
    held: list[int],
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    valid: Tensor | None,
    scaling: float,
    drafts: bool,
) -> tuple[Tensor, Tensor, Pinned]:
    """Keys and values [B, H, T, d] with those that are pinned in front: in the order of `pinned_order`.

    That is in rows which the chunk begins, if it is long enough for a page to be encoded.

    Args:
        held: tokens of the rows before.
        query: [B, Hq, T, d]; the last of them are enough where all rows begin, without padding.
        valid: bool [B, T], False for padding; None if there is none.
        drafts: the last new tokens may be drafts.
    """
    tokens, none = keys.shape[2], Pinned((0,) * len(held))
    if not config.pinned_tokens or all(held):
        return keys, values, none
    new = [tokens] * len(held) if valid is None else valid.sum(1).tolist()
    after = LONGEST_DRAFT if drafts else 0
    least = config.front + config.recent + config.page_size
    prompts = [
        n - after if n - after >= least and not before else 0 for n, before in zip(new, held, strict=True)
    ]
    if not any(prompts):
        return keys, values, none
    if valid is None and all(prompts):
        prompt, asking = prompts[0], query[:, :, : query.shape[2] - after]
        order = pinned_order(config, keys[:, :, :prompt], asking, scaling)
        if after:  # what comes after the prompt stays where it is
            rest = torch.arange(prompt, tokens, device=keys.device).expand(*order.shape[:2], -1)
            order = torch.cat((order, rest), 2)
        at = order[..., None].expand_as(keys)
        return keys.gather(2, at), values.gather(2, at), Pinned(tuple(prompts))
    keys, values = keys.clone(), values.clone()
    everything = torch.ones(tokens, dtype=torch.bool, device=keys.device)
    for b, prompt in enumerate(prompts):
        if prompt:
            real = everything if valid is None else valid[b]
            at = real.nonzero()[:prompt, 0]  # of this row's prompt, without padding
            asking = query[b : b + 1, :, at[-OBSERVED_QUERIES:]]
            own = keys[b : b + 1, :, at], values[b : b + 1, :, at]
            order = pinned_order(config, own[0], asking, scaling)[0, :, :, None].expand_as(own[0][0])
            for to, x in zip((keys, values), own, strict=True):
                to[b, :, at] = x[0].gather(1, order)
    return keys, values, Pinned(tuple(prompts))


def keep_pinned(
    config: SelfIndexConfig, k: Tensor, v: Tensor, q: Tensor, scaling: float, prompt: int
) -> list[RowChange]:
    """Paper preset: pinned tokens stay in full precision, the rest of the prompts is encoded.

    Tokens after the first `prompt` are not part of them: they are kept like those of later steps.

    Args:
        k, v: [B, H, n, d]; q: [B, Hq, n, d].
    """
    pinned = choose_pinned(k, _last_queries(q, k.shape[1]), config.sinks, scaling, end=prompt)
    rest = _others(pinned, prompt)
    row = torch.arange(k.shape[0], device=k.device)[:, None, None]
    head = torch.arange(k.shape[1], device=k.device)[:, None]
    encoded = zip(*(x[row, head, rest] for x in (k, v)), strict=True)
    kept = zip(*(torch.cat((x[row, head, pinned], x[:, :, prompt:]), 2) for x in (k, v)), strict=True)
    constants = ops.prompt_statistics(k[:, :, :prompt])
    return [RowChange(*parts, prompt) for parts in zip(encoded, kept, constants, strict=True)]
