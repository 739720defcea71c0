"""Ways to most of what a decode step selects that read a part of the index; measured by evals.levels.

Everything is simulated in plain PyTorch from the index that the product writes, and float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfindex.backends import reference
from selfindex.codec import PageFormat, codec_for, measure_balance
from selfindex.codec.packing import unpack_bits
from selfindex.config import SelfIndexConfig
from selfindex.index.select import SHARPNESS, sum_of_softmax

from .pages import SAMPLED, by_bound, by_gaussian, by_mean

CONFIG = SelfIndexConfig()
PAGE, SINKS = CONFIG.page_size, int(CONFIG.sinks)
TAIL, STEPS = 128, 16
"""Tokens at the end of a text, evenly spread over which are so many decode steps."""
SECTOR = 32
"""Bytes that a GPU's memory reads at least."""


@dataclass(frozen=True)
class Case:
    """A layer's encoded tokens and the queries of some steps; M pages, S = M P slots.

    Attributes:
        queries: [H, G, T, d] times the scaling, as the model has them; mapped: as the codec scores them.
        keys: [H, S, d] of the model; signs: [H, S, d] of the index, +-1; gain: [H, S]; mean: [H, M, d].
        logits: [H, G, T, S], of one level; votes: [H, T, S].
        mass: [H, T, S], true softmax of the steps, summed over the query heads.
    """

    queries: Tensor
    mapped: Tensor
    keys: Tensor
    signs: Tensor
    gain: Tensor
    mean: Tensor
    logits: Tensor
    votes: Tensor
    mass: Tensor


def vote(logits: Tensor) -> Tensor:
    """Votes of the query heads together: [H, G, T, n] -> [H, T, n]."""
    return sum_of_softmax(logits.flatten(0, 1)[None], len(logits))[0]


def case(query: Tensor, keys: Tensor, scaling: float) -> Case:
    """Encode all but the window of a row and score it from the index.

    Args:
        query: [Hq, N, d]; keys: [H, N, d]; of all tokens of a text.
    """
    heads, tokens, d = keys.shape
    keys, grouped = keys.float(), query.float().unflatten(0, (heads, -1))
    pages = (tokens - TAIL - int(CONFIG.recent) - SINKS) // PAGE
    held = keys[:, SINKS : SINKS + pages * PAGE]
    positions = torch.arange(tokens - TAIL, tokens, TAIL // STEPS)
    queries = grouped[:, :, positions]

    # Balanced by the first two pages, like the product at the end of a prompt.
    first = slice(SINKS, SINKS + 2 * PAGE)
    balance = measure_balance(keys[None, :, first], grouped[:, :, first].square().mean((1, 2)))[None]
    fmt = PageFormat("balanced", heads, d, PAGE)
    codec = codec_for(fmt.name)
    by_page = held.unflatten(1, (pages, PAGE)).transpose(0, 1)
    counts = torch.full((pages,), PAGE, dtype=torch.int32)
    index, _ = reference.encode(by_page, torch.zeros_like(by_page), counts, balance, fmt.name)
    table = torch.arange(pages, dtype=torch.int32)[None]
    flat = queries.flatten(0, 1)[None]
    logits = reference.score(flat, index, table, counts[None], balance, scaling, fmt.name)
    logits = logits[0].unflatten(0, (heads, -1))

    signs = unpack_bits(fmt.view(index, fmt.index, "codes")).float() * 2 - 1  # [M, H, P, d]
    gain = codec.token_gain(index[None])
    assert gain is not None, "the balanced preset has a scale a token"
    step = fmt.view(index, fmt.index, "mean_step")[..., None]
    mean = fmt.view(index, fmt.index, "mean").float() * step
    later = torch.arange(tokens) > positions[:, None]
    true = (queries @ keys.mT[:, None] * scaling).masked_fill(later, -torch.inf).softmax(-1)
    return Case(
        queries * scaling,
        codec.map_query(queries.flatten(1, 2)[None], balance)[0].view_as(queries) * scaling,
        held,
        signs.transpose(0, 1).flatten(1, 2),
        gain[0].transpose(0, 1).flatten(1),
        mean.transpose(0, 1),
        logits,
        vote(logits),
        true[..., SINKS : SINKS + pages * PAGE].sum(1),
    )


def selection(votes: Tensor, budget: int) -> Tensor:
    """What a budget selects: [H, T, S] -> bool [H, T, S]."""
    slots = reference.select(votes[None], torch.tensor([budget], dtype=torch.int32), budget)[0].long()
    return torch.zeros_like(votes, dtype=torch.bool).scatter(-1, slots, True)


def page_scores(x: Case) -> dict[str, Tensor]:
    """Estimates of pages by name, the larger the earlier opened: [H, T, M]."""

    def by(estimate: Any) -> Tensor:
        found = [estimate(q, k, PAGE) for q, k in zip(x.queries, x.keys, strict=True)]
        return vote(torch.stack(found))

    step = PAGE // SAMPLED
    paged = x.logits.unflatten(-1, (-1, PAGE))
    centre = x.mapped @ x.mean.mT[:, None]  # [H, G, T, M]
    spread = x.gain.unflatten(-1, (-1, PAGE)).square().mean(-1).sqrt()[:, None, None]
    sigma = x.mapped.norm(dim=-1, keepdim=True) * spread
    return {
        "largest vote": x.votes.unflatten(-1, (-1, PAGE)).amax(-1),
        "mean": by(by_mean),
        "gaussian": by(by_gaussian),
        "bound": by(by_bound),
        f"{SAMPLED} signs": vote(paged[..., step // 2 :: step].amax(-1)),
    } | {f"mean + {z} sigma": vote(centre + z * sigma) for z in (1, 2, 3)}


def first_pass(d: int) -> dict[str, tuple[int, int]]:
    """Bytes of a page's summary by estimate, and how many of them opening the page does not read again."""
    own = d + 12  # the mean, and float32 numbers
    return {
        "mean": (own, own),
        "gaussian": (own + d + 4, own),
        "bound": (2 * (d + 4), 0),
        f"{SAMPLED} signs": (own + SAMPLED * (d // 8 + 1), own + SAMPLED * (d // 8 + 1)),
    } | {f"mean + {z} sigma": (own + 4, own) for z in (1, 2, 3)}


def record_bytes(d: int) -> int:
    """A page of a head in the index."""
    return PAGE * (d // 8 + 1) + d + 12


def held_by(order: Tensor, content: Tensor) -> Tensor:
    """Content of the first 1 .. M pages of an order: scores and content [H, T, M] -> [H, T, M]."""
    return content.gather(-1, order.argsort(dim=-1, descending=True, stable=True)).cumsum(-1)


def partial_logits(x: Case, part: float, longest: bool) -> tuple[Tensor, Tensor]:
    """Logits from some of the groups of 4 channels: the first, or those with the longest queries.

    Returns:
        (logits [H, G, T, S], what the other groups add at most, likewise).
    """
    groups = x.mapped.abs().unflatten(-1, (-1, 4)).sum(-1)  # [H, G, T, d / 4]
    count = round(part * groups.shape[-1])
    ranks = groups.sum(1).argsort(-1, descending=True)[..., :count]  # [H, T, count]
    if not longest:
        ranks = torch.arange(count).expand_as(ranks)
    read = torch.zeros_like(groups[:, 0], dtype=torch.bool).scatter(-1, ranks, True)[:, None]
    channels = read.repeat_interleave(4, -1)
    sums = (x.mapped * channels) @ x.signs.mT[:, None]
    rest = (groups * ~read).sum(-1, keepdim=True)
    gain = x.gain[:, None, None]
    offset = (x.mapped @ x.mean.mT[:, None]).repeat_interleave(PAGE, -1)
    return sums * gain + offset, rest * gain


def read_by_channels(candidates: Tensor, d: int, part: float, longest: bool) -> tuple[float, float]:
    """Share of the index that is read: as bytes, and as whole sectors of memory.

    Fixed channels lie token by token in two planes; channels that differ by query, group by group with the
    half bytes of a page's tokens side by side.
    """
    rest, record = (1 - part) * d / 8, record_bytes(d)
    near = 2 * SECTOR if longest else int(SECTOR / rest)
    tokens = candidates.unflatten(-1, (-1, PAGE)).float()
    sectors = sum(block.amax(-1) * block.shape[-1] for block in tokens.split(near, -1))
    alone, whole = (float(n.mean()) * rest for n in (tokens.sum(-1), sectors))  # type: ignore[union-attr]
    return tuple((record - PAGE * rest + second) / record for second in (alone, whole))  # type: ignore[return-value]


def upper_bounds(x: Case) -> dict[str, Tensor]:
    """The most that a vote of a page, [H, T, M], or of a token, [H, T, S], can be, by what it is made of."""
    total = (SHARPNESS * x.logits).logsumexp(-1, keepdim=True)
    gain = x.gain.unflatten(-1, (-1, PAGE))
    centre = x.mapped @ x.mean.mT[:, None]
    largest = x.mapped.abs().sum(-1, keepdim=True) * gain.amax(-1)[:, None, None]
    coded = x.signs.unflatten(1, (-1, PAGE)) * gain[..., None]
    top, low = coded.amax(2).mT[:, None], coded.amin(2).mT[:, None]
    ranged = x.mapped.clamp(min=0) @ top + x.mapped.clamp(max=0) @ low
    half, rest = partial_logits(x, 0.5, True)
    bounds = {
        "pages, by the largest scale": centre + largest,
        "pages, by ranges of channels": centre + ranged,
        "tokens, after half of the groups": half + rest,
    }
    return {name: (SHARPNESS * bound - total).exp().sum(1) for name, bound in bounds.items()}


def skipped(bounds: Tensor, last: Tensor) -> float:
    """Share of what cannot be selected: bounds [H, T, n] below the smallest selected vote [H, T, 1]."""
    # A little slack for rounding: a bound may equal the vote itself.
    return float((bounds < last * (1 - 1e-4)).float().mean())


def paged(values: Tensor) -> Tensor:
    """Sums over pages: [..., S] -> [..., M]."""
    return values.unflatten(-1, (-1, PAGE)).sum(-1)
