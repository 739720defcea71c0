"""Attention of many new tokens to encoded ones, which are decoded once, a bounded number at a time.

`dense_attend` decodes every page for every tile of queries, in registers. That is least work for a few tiles;
for many it takes more time than decoding to memory, from where the kernels for full-precision tokens read.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..backends import ops
from ..store import LayerStore
from .kernels import attend_plain, has_kernel
from .parts import Parts

FEWEST_QUERIES = 384
"""New tokens a row from which decoding to memory pays."""
MOST_SCRATCH = 256 << 20
"""Bytes of decoded keys and values at a time."""
TILE, FEWEST_KEYS = 128, 2048
"""Queries of a head that PyTorch's kernels give a block, and keys for which a block of its own pays."""
STAGED_PAGES = 1024
"""Offloaded pages of all rows on the device at a time."""

_refused: set[tuple[object, ...]] = set()
"""Kinds of queries whose kernel turned out not to run."""


def is_decoded(store: LayerStore, query: Tensor, scaling: float) -> bool:
    """Whether `decoded_parts` serves these queries: many, on a GPU, of a shape that has a fast kernel."""
    if query.device.type != "cuda" or query.shape[2] < FEWEST_QUERIES or _kind(store, query) in _refused:
        return False
    if query.dtype not in (torch.float16, torch.bfloat16):
        return False
    some = query[:, : store.format.kv_heads]  # keys look like them
    return has_kernel(query, some, some, scaling)


def _kind(store: LayerStore, query: Tensor) -> tuple[object, ...]:
    return query.device, query.dtype, query.shape[1], store.format.kv_heads, query.shape[3]


def pages_at_a_time(kv_heads: int, dim: int, page: int, dtype: torch.dtype, rows: int = 1) -> int:
    """Pages of each row whose keys and values take `MOST_SCRATCH` bytes, or one."""
    return max(1, MOST_SCRATCH // (2 * kv_heads * dim * dtype.itemsize * page * rows))


def even(pages: int, most: int) -> int:
    """Pages at a time, at most so many or one, of which the last ones are about as many as the others."""
    return max(1, -(-pages // max(1, -(-pages // max(1, most)))))


def splits_for(query: Tensor, tokens: int) -> int:
    """Among how many blocks the tokens are divided where queries alone do not occupy the GPU: a power of two.

    PyTorch's kernels do not divide them by themselves. It divides `tokens`, too.
    """
    sms = multiprocessors(query.device)
    tiles = query.shape[0] * query.shape[1] * -(-query.shape[2] // TILE)
    splits = 1
    while 2 * splits * tiles <= sms and tokens % (2 * splits) == 0 and tokens >= 2 * splits * FEWEST_KEYS:
        splits *= 2
    return splits


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 of others."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def groups_of(store: LayerStore) -> list[slice]:
    """Rows that can be attended to together: all if they have as many tokens in every page, or each alone."""
    counts = [row.counts for row in store.table.rows]
    if all(each == counts[0] for each in counts):
        return [slice(0, store.batch)]
    return [slice(b, b + 1) for b in range(store.batch)]


def decoded_parts(store: LayerStore, rows: slice, query: Tensor, scaling: float, parts: Parts) -> bool:
    """Add attention to all encoded tokens of some rows, with the same number of tokens in every page.

    Args:
        query: [n, Hq, T, d] of these rows, of which `is_decoded` holds.
    Returns:
        False, and nothing is added, if the kernel turned out not to run.
    """
    fmt, (n, _, _, dim) = store.format, query.shape
    counts = store.table.rows[rows.start].counts
    step = pages_at_a_time(fmt.kv_heads, dim, fmt.page_size, query.dtype, n)
    if store.pool.offloading:
        step = min(step, max(1, STAGED_PAGES // n))
    step = even(len(counts), step)
    for first in range(0, len(counts), step):
        tokens = sum(counts[first : first + step])
        keys, values = query.new_empty(2, n * tokens, fmt.kv_heads, dim).transpose(1, 2)
        starts = torch.arange(0, n * tokens, tokens, dtype=torch.int32, device=query.device)
        decode(store, rows, slice(first, first + step), starts, keys, values)
        keys, values = (x.unflatten(1, (n, tokens)).transpose(0, 1) for x in (keys, values))
        try:
            found = attend_split(query, keys, values, scaling)
        except RuntimeError as error:
            # Out of memory and errors of the GPU are other types; and it ran for the pages before.
            if first or type(error) is not RuntimeError:
                raise
            _refused.add(_kind(store, query))
            warnings.warn(
                f"selfindex decodes pages in a slower way for long chunks: {str(error).splitlines()[0]}",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        for part in found:
            parts.add(*part)
    return True


def decode(
    store: LayerStore, rows: slice, pages: slice, starts: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Decode some pages of some rows; further arguments as of `decode_pages`."""
    table, counts = (x[rows, pages] for x in store.table.tensors())
    pools, constants = (store.pool.index, store.pool.payload), store.constants
    if store.pool.offloading:
        *staged, table = store.table.stage(pages.start, pages.stop, rows)
        pools = staged[0], staged[1]
    assert constants is not None  # there are pages
    constants = constants if constants.shape[0] == 1 else constants[rows]
    ops.decode_pages(*pools, table, counts, starts, keys, values, constants, store.format.name)


def attend_split(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> list[tuple[Tensor, Tensor]]:
    """`attend_plain`, not causal, of keys that are divided among as many blocks as occupy a GPU: in parts."""
    splits = splits_for(query, keys.shape[2])
    # A row that is split is several rows with the same queries.
    keys, values = (x.unflatten(2, (splits, -1)).transpose(1, 2).flatten(0, 1) for x in (keys, values))
    asking = query.repeat_interleave(splits, 0) if splits > 1 else query
    output, lse = attend_plain(asking, keys, values, scaling, causal=False)
    return [(output[i::splits], lse[i::splits]) for i in range(splits)]
