"""Random encoded caches on the GPU, for comparing kernels with the reference operators."""

from dataclasses import dataclass

import torch
from pages import block_table, constants_for
from torch import Tensor

from selfindex.backends import reference
from selfindex.codec import PageFormat
from selfindex.index.select import sum_of_softmax

DEVICE = "cuda"


@dataclass
class Cache:
    """Arguments of the operators, and the raw tokens they were made from."""

    fmt: PageFormat
    query: Tensor
    index: Tensor
    payload: Tensor
    table: Tensor
    counts: Tensor
    constants: Tensor
    scaling: float

    def decode_arguments(self, budgets, width=None):
        wanted = torch.tensor(budgets, dtype=torch.int32, device=DEVICE)
        width = max(1, *budgets) if width is None else width
        return (
            self.query,
            self.index,
            self.payload,
            self.table,
            self.counts,
            wanted,
            width,
            self.constants,
            self.scaling,
            self.fmt.name,
        )


def make_cache(
    lengths,
    dim=128,
    heads=2,
    groups=4,
    bits=2,
    dtype=torch.bfloat16,
    preset="balanced",
    seed=0,
    short=(),
    shared=False,
    peaked=True,
):
    """Rows of `lengths` encoded tokens in scattered blocks.

    Args:
        short: pages of every row whose count is cut to an arbitrary smaller number.
        shared: all rows use the blocks of the longest one.
        peaked: some keys point along a query, as in real attention.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE)

    fmt = PageFormat(preset, heads, dim, 128, bits)
    batch, pages = len(lengths), [-(-n // 128) for n in lengths]
    blocks = sum(pages) + 3
    query = 2 * normal(batch, heads * groups, 1, dim)
    keys = normal(blocks, heads, 128, dim) + 0.5 * normal(1, heads, 1, dim)
    if peaked:
        chosen = torch.rand(blocks, heads, 128, generator=generator, device=DEVICE) < 0.02
        along = query[torch.randint(batch, (blocks,), generator=generator, device=DEVICE), ::groups]
        keys += 0.4 * chosen[..., None] * along
    values = normal(blocks, heads, 128, dim) * torch.rand(
        blocks, heads, 128, 1, generator=generator, device=DEVICE
    )
    constants = constants_for(fmt, keys).to(DEVICE)
    order = torch.randperm(blocks, generator=generator, device=DEVICE).int()
    table, counts = (x.to(DEVICE) for x in block_table(lengths, order.cpu(), 128, short, shared))
    full = torch.full((blocks,), 128, dtype=torch.int32, device=DEVICE)
    for start in range(0, blocks, 64):
        part = slice(start, start + 64)
        encoded = reference.encode(
            keys[part].to(dtype), values[part].to(dtype), full[part], constants, fmt.name
        )
        if start == 0:
            index = torch.empty(blocks, fmt.index_bytes, dtype=torch.uint8, device=DEVICE)
            payload = torch.empty(blocks, fmt.payload_bytes, dtype=torch.uint8, device=DEVICE)
        index[part], payload[part] = encoded
    return Cache(fmt, query.to(dtype), index, payload, table, counts, constants, dim**-0.5)


def votes(cache):
    """What tokens are selected by, positive: [B, H, 1, S]; -inf where there is none."""
    stored = cache.index, cache.table, cache.counts, cache.constants, cache.scaling, cache.fmt.name
    if cache.fmt.preset == "balanced":
        return sum_of_softmax(reference.score(cache.query, *stored), cache.fmt.kv_heads)
    mean = cache.query.float().unflatten(1, (cache.fmt.kv_heads, -1)).mean(2)
    scores = reference.score(mean, *stored)
    return scores.softmax(-1).masked_fill(scores == -torch.inf, -torch.inf)


def tokens(cache):
    """Encoded tokens of every row."""
    return cache.counts.sum(1).tolist()
