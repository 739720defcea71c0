"""Memory as a serving engine owns it: pages cut out of one tensor, full-precision tokens in blocks."""

import torch


def pools(fmt, index, payload, gap=0):
    """The same pages as views of one uint8 tensor: a block is index bytes, payload bytes and a gap.

    Args:
        gap: bytes between a page and the next one, a multiple of 16.
    """
    size = fmt.index_bytes + fmt.payload_bytes
    memory = torch.full((index.shape[0], size + gap), 0xA5, dtype=torch.uint8, device=index.device)
    views = memory[:, : fmt.index_bytes], memory[:, fmt.index_bytes : size]
    for view, plane in zip(views, (index, payload), strict=True):
        view.copy_(plane)
        assert view.data_ptr() % 16 == view.stride(0) % 16 == 0
        assert not view.is_contiguous()
    return views


def empty_pools(fmt, blocks, device="cpu"):
    """`pools` whose bytes nobody wrote, 0x5A."""
    sizes = fmt.index_bytes, fmt.payload_bytes
    return pools(
        fmt, *(torch.full((blocks, n), 0x5A, dtype=torch.uint8, device=device) for n in sizes), gap=48
    )


def window(keys, values, lengths, block=16, seed=0, columns=None):
    """Tokens [B, H, room, d] of rows in blocks of an engine: (window [W, H, bs, 2 d], table int32 [B, M]).

    A row has `lengths[b]` tokens and the blocks that they and one more need; the rest of its table is stale
    ids, and memory that holds none of these tokens is NaN. Heads lie apart as in a cache of which others own
    a part.
    """
    batch, heads, _, dim = keys.shape
    needed = [max(0, n // block + 1) for n in lengths]
    columns = columns or max(needed)
    order = 1 + torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(seed))
    memory = keys.new_full((len(order) + 1, heads + 1, block, 2 * dim), torch.nan)
    table = order[torch.arange(batch * columns).view(batch, columns) % len(order)].int()
    taken = 0
    for b, n in enumerate(lengths):
        own = order[taken : taken + needed[b]]
        table[b, : needed[b]] = own.int()
        taken += needed[b]
        for p in range(max(0, n)):
            token = torch.cat((keys[b, :, p], values[b, :, p]), -1)
            memory[own[p // block], :heads, p % block] = token
    return memory[:, :heads], table.to(keys.device)


def check_pools(pools, wanted, blocks):
    """Pools hold these pages in these blocks, and elsewhere what `empty_pools` put there."""
    for pool, planes in zip(pools, wanted, strict=True):
        expected = torch.full_like(pool, 0x5A)
        for block, page in zip(blocks, planes, strict=True):
            if block >= 0:
                expected[block] = page
        assert torch.equal(pool, expected)
