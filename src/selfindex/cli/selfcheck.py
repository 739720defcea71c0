"""The self-check of `selfindex doctor`: every operator against plain attention, on random data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import ops
from ..codec import Codec, PageFormat, codec_for, measure_balance
from ..codec.paper import prompt_statistics
from ..index.select import sum_of_softmax

HEADS, GROUP, PAGE, PAGES = 2, 2, 64, 4
BUDGET = 32
"""Tokens selected, and planted so that they stand out: rounding of scores cannot change the selection."""
TOLERANCE = 1e-3
"""Allowed difference between an operator and its plain form.

Compiled operators keep queries in 15 bits, which moves outputs by up to 1e-4 here. One exchanged
token or a scale that is off by one step moves them by 5e-3 and more.
"""
SIMILARITY = 0.7
"""Least cosine between attention over 2-bit codes and over the originals; 0.8 to 0.95 is usual here."""


@dataclass(frozen=True)
class Check:
    """Outcome for one preset and head dimension.

    Attributes:
        difference: largest difference from plain attention over the decoded tokens.
        failures: what went wrong, in words; empty if all is well.
    """

    preset: str
    head_dim: int
    difference: float
    failures: list[str]


@torch.inference_mode()
def check(preset: str, head_dim: int, device: torch.device) -> Check:
    """Encode random pages, score, select and attend; compare each step with the obvious way."""
    codec = codec_for(PageFormat(preset, HEADS, head_dim, PAGE).name)
    generator = torch.Generator().manual_seed(head_dim)
    tokens, scaling = PAGES * PAGE, head_dim**-0.5

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query = random(1, HEADS, 1, 1, head_dim).expand(-1, -1, GROUP, -1, -1).flatten(1, 2)  # [1, Hq, 1, d]
    keys, values = random(1, HEADS, tokens, head_dim), random(1, HEADS, tokens, head_dim)
    planted = torch.randperm(tokens, generator=generator)[:BUDGET].sort().values
    keys[:, :, planted] += 2 * query[:, ::GROUP]  # tokens that attention must find
    query, keys, values = query.to(device), keys.to(device), values.to(device)
    pages = [x[0].unflatten(1, (PAGES, PAGE)).transpose(0, 1) for x in (keys, values)]  # [M, H, P, d]
    counts = torch.full((PAGES,), PAGE, dtype=torch.int32, device=device)
    constants = _constants(preset, keys, query)
    name = codec.format.name
    index, payload = ops.encode(pages[0], pages[1], counts, constants, name)
    table = torch.arange(PAGES, dtype=torch.int32, device=device)[None]
    stored = (index, payload, table)

    failures = []
    logits = ops.score(query, index, table, counts[None], constants, scaling, name)
    scores = sum_of_softmax(logits, HEADS)
    budget = torch.tensor([BUDGET], dtype=torch.int32, device=device)
    slots = ops.select(scores, budget, BUDGET)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :BUDGET].sort(-1).values
    if not torch.equal(slots.long(), best):
        failures.append("select is not the sorted top of the scores")
    if not torch.isin(planted.to(device), slots[0, 0, 0]).all():
        failures.append("the index missed tokens that dominate attention")
    every = torch.arange(tokens, dtype=torch.int32, device=device).expand(1, HEADS, 1, -1)
    rest = (constants, scaling, name)
    results = {
        "sparse_attend": (ops.sparse_attend(query, *stored, slots, *rest)[0], slots),
        "sparse_attend of all": (ops.sparse_attend(query, *stored, every, *rest)[0], every),
        "sparse_decode": (ops.sparse_decode(query, *stored, counts[None], budget, BUDGET, *rest)[0], slots),
        "dense_attend": (ops.dense_attend(query, *stored, counts[None], *rest)[0], every),
    }
    worst = 0.0
    for operator, (output, chosen) in results.items():
        expected = _plain(codec, query, stored, chosen[:, :, 0], constants, scaling)
        difference = float((output - expected).abs().max())
        worst = max(worst, difference)
        if not difference < TOLERANCE:
            failures.append(f"{operator} differs from plain attention by {difference:.1e}")
    exact = _attention(query, keys, values, scaling)
    similarity = torch.cosine_similarity(results["dense_attend"][0].flatten(), exact.flatten(), dim=0)
    if not similarity > SIMILARITY:
        failures.append(f"compressed attention is unlike the exact one (cosine {float(similarity):.2f})")
    return Check(preset, head_dim, worst, failures)


def _constants(preset: str, keys: Tensor, query: Tensor) -> Tensor:
    if preset == "paper":
        return prompt_statistics(keys[0])[None]
    return measure_balance(keys, query.square().mean((0, 2)).unflatten(0, (HEADS, GROUP)).mean(1))[None]


def _plain(
    codec: Codec,
    query: Tensor,
    stored: tuple[Tensor, Tensor, Tensor],
    slots: Tensor,
    constants: Tensor,
    scaling: float,
) -> Tensor:
    """Attention over decoded tokens, spelled out; slots int [1, H, K] -> [1, Hq, 1, d]."""
    index, payload, _ = stored  # the table is the identity
    block, offset = slots.long() // PAGE, slots.long() % PAGE
    keys = codec.read_keys(index, payload, block, offset, constants)
    values = codec.unmap_output(codec.read_values(index, payload, block, offset))
    mapped = codec.map_query(query.unflatten(1, (HEADS, GROUP)), constants).flatten(1, 2)
    return _attention(mapped, keys, values, scaling)


def _attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    keys, values = keys.repeat_interleave(GROUP, 1), values.repeat_interleave(GROUP, 1)
    return (query @ keys.transpose(-1, -2) * scaling).softmax(-1) @ values
