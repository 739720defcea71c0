"""Random encoded caches on the CPU, for comparing compiled operators with the reference."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from pages import block_table, constants_for, gaussian
from torch import Tensor

from selfindex.backends import reference
from selfindex.backends.cpu import operators
from selfindex.codec import PageFormat, codec_for
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
        query, index, _, *rest = self.dense_arguments()
        if self.fmt.preset == "paper":
            return reference.score(self.mean_query, index, *rest)
        return sum_of_softmax(reference.score(query, index, *rest), self.fmt.kv_heads)

    @property
    def mean_query(self):
        """[B, H, T, d], what the paper preset scores."""
        return self.query.float().unflatten(1, (self.fmt.kv_heads, -1)).mean(2)

    def near_tie(self):
        """Paper preset: how far apart scores may be that compiled tables order the other way, [B, H, T].

        An entry is rounded to a step, 1 / 16382 of the range of the widest group: half a step in each of
        the d / 4 groups of two tokens.
        """
        table = codec_for(self.fmt.name).lut(self.mean_query, self.constants)
        widest = (table.amax(-1) - table.amin(-1)).amax(-1)
        return self.scaling * widest / 16382 * self.fmt.head_dim / 4

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
    preset="balanced",
):
    """Rows of `lengths` encoded tokens in scattered blocks.

    Args:
        bits: of the values, of `balanced`.
        short: pages of every row whose count is cut to an arbitrary smaller number.
        shared: all rows use the blocks of the longest one.
    """
    pages = [-(-n // page) for n in lengths]
    fmt = PageFormat(preset, heads, dim, page, bits if preset == "balanced" else 2)
    blocks = sum(pages) + 1
    query, constants, index, payload = _pools(fmt.name, len(lengths), blocks, groups, queries, seed)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).int()
    table, counts = block_table(lengths, order, page, short, shared)
    return Cache(fmt, query.to(dtype, copy=True), index, payload, table, counts, constants, dim**-0.5)


@lru_cache(maxsize=100)
def _pools(name, batch, blocks, groups, queries, seed):
    """Queries, constants and encoded pages, which one instruction set after the other is tested on."""
    fmt = PageFormat.parse(name)
    heads, dim, page = fmt.kv_heads, fmt.head_dim, fmt.page_size
    query = 2 * gaussian(batch, heads * groups, queries, dim, seed=seed)
    keys = gaussian(blocks, heads, page, dim, seed=seed + 1) + 0.5 * gaussian(1, heads, 1, dim, seed=seed + 2)
    # Some keys point along a query, as in real attention.
    along = (gaussian(blocks, heads, page, 1, seed=seed + 3) > 2) * query[:1, ::groups, :1]
    values = gaussian(blocks, heads, page, dim, seed=seed + 4)
    full, keys = torch.full((blocks,), page, dtype=torch.int32), keys + 0.4 * along
    constants = constants_for(fmt, keys)
    return query, constants, *reference.encode(keys, values, full, constants, name)
