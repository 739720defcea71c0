"""Random encoded caches on the CPU, for comparing compiled operators with the reference."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from pages import block_table, gaussian
from torch import Tensor

from selfindex.backends import reference
from selfindex.backends.cpu import operators
from selfindex.codec import PageFormat
from selfindex.index.select import sum_of_softmax


@dataclass
class Cache:
    """Arguments of the operators."""

    fmt: PageFormat
    query: Tensor
    index: Tensor
    payload: Tensor
    table: Tensor
    counts: Tensor
    constants: Tensor
    scaling: float

    @property
    def tokens(self):
        return self.counts.sum(1).tolist()

    def dense_arguments(self):
        stored = (self.index, self.payload, self.table, self.counts)
        return (self.query, *stored, self.constants, self.scaling, self.fmt.name)

    def decode_arguments(self, budgets, width=None):
        dense = self.dense_arguments()
        wanted = torch.tensor(budgets, dtype=torch.int32)
        return (*dense[:5], wanted, max(budgets) if width is None else width, *dense[5:])

    def votes(self):
        """Scores that the reference selects by, [B, H, T, S]."""
        dense = self.dense_arguments()
        return sum_of_softmax(reference.score(*dense[:2], *dense[3:]), self.fmt.kv_heads)

    def decode(self, budgets, width=None):
        """(output, log-sum-exp, selected slots) of the compiled operator."""
        arguments = self.decode_arguments(budgets, width)
        shape = (len(budgets), self.fmt.kv_heads, self.query.shape[2], arguments[6])
        chosen = torch.full(shape, -7, dtype=torch.int32)
        return *operators.sparse_decode(*arguments, chosen=chosen), chosen

    def attend(self, slots):
        """The reference's attention to given slots."""
        return reference.sparse_attend(
            self.query, self.index, self.payload, self.table, slots, *self.dense_arguments()[5:]
        )


def make_cache(
    lengths,
    dim=64,
    heads=2,
    groups=2,
    bits=2,
    page=128,
    queries=1,
    dtype=torch.float32,
    short=(),
    shared=False,
    seed=0,
):
    """Rows of `lengths` encoded tokens in scattered blocks.

    Args:
        short: pages of every row whose count is cut to an arbitrary smaller number.
        shared: all rows use the blocks of the longest one.
    """
    pages = [-(-n // page) for n in lengths]
    blocks, fmt = sum(pages) + 1, PageFormat("balanced", heads, dim, page, bits)
    query, constants, index, payload = _pools(fmt.name, len(lengths), blocks, groups, queries, seed)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).int()
    table, counts = block_table(lengths, order, page, short, shared)
    return Cache(fmt, query.to(dtype, copy=True), index, payload, table, counts, constants, dim**-0.5)


@lru_cache(maxsize=100)
def _pools(name, batch, blocks, groups, queries, seed):
    """Queries, balance and encoded pages, which one instruction set after the other is tested on."""
    fmt = PageFormat.parse(name)
    heads, dim, page = fmt.kv_heads, fmt.head_dim, fmt.page_size
    query = 2 * gaussian(batch, heads * groups, queries, dim, seed=seed)
    keys = gaussian(blocks, heads, page, dim, seed=seed + 1) + 0.5 * gaussian(1, heads, 1, dim, seed=seed + 2)
    # Some keys point along a query, as in real attention.
    along = (gaussian(blocks, heads, page, 1, seed=seed + 3) > 2) * query[:1, ::groups, :1]
    values = gaussian(blocks, heads, page, dim, seed=seed + 4)
    constants = torch.linspace(0.5, 2.0, heads * dim).view(1, heads, dim)
    full = torch.full((blocks,), page, dtype=torch.int32)
    return query, constants, *reference.encode(keys + 0.4 * along, values, full, constants, name)
