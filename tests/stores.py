"""Layer stores filled with random tokens, and reading back what they hold."""

import backends
import torch
from pages import gaussian, leave_coded_domain

from selfindex import SelfIndexConfig
from selfindex.codec import codec_for
from selfindex.store import LayerStore

SMALL = {"sinks": 4, "recent": 8, "page_size": 8, "dense_below": 0, "min_tokens": 1}
"""Options under which a few dozen tokens fill several pages."""


def small_options(**options):
    """`SMALL` with the backend's page size, and further options."""
    return SMALL | {"page_size": backends.current.page_size} | options


def small_config(**options):
    return SelfIndexConfig(**small_options(**options))


def paper_config(**options):
    return small_config(preset="paper", **({"sinks": 4, "recent": 0} | options))


CONFIGS = {"balanced": small_config, "paper": paper_config}


def new_store(config, batch=1, heads=2, dim=64, dtype=torch.float32, balance=None):
    return LayerStore(
        config, torch.empty(batch, heads, 0, dim, dtype=dtype, device=backends.current.device), balance
    )


def random_tokens(store, new, groups=2, seed=0):
    """(keys, values, query) of `new` random tokens for a store."""
    batch, heads, _, dim = store.window.keys.shape
    dtype = store.window.keys.dtype
    keys = gaussian(batch, heads, new, dim, seed=3 * seed, dtype=dtype)
    values = gaussian(batch, heads, new, dim, seed=3 * seed + 1, dtype=dtype)
    return keys, values, gaussian(batch, heads * groups, new, dim, seed=3 * seed + 2, dtype=dtype)


def fill(store, *lengths, groups=2, seed=0):
    """Append chunks of these lengths; returns all keys and values."""
    chunks = []
    for i, new in enumerate(lengths):
        keys, values, query = random_tokens(store, new, groups, seed + i)
        store.append(keys, values, query, None, 0.125)
        chunks.append((keys, values))
    return [torch.cat(x, 2) for x in zip(*chunks, strict=True)]


def filled(config, tokens=60, **options):
    """A store with so many random tokens."""
    store = new_store(config, **options)
    fill(store, tokens)
    return store


def decoded_pages(store, row):
    """Encoded tokens of a row as float32 keys and values [H, n, d] on the CPU, oldest first."""
    fmt, held = store.format, store.table.rows[row]
    if not held.blocks:
        empty = torch.zeros(fmt.kv_heads, 0, fmt.head_dim)
        return empty, empty
    device = store.pool.index.device
    block = torch.tensor(held.blocks, device=device).repeat_interleave(
        torch.tensor(held.counts, device=device)
    )[None, None]
    offset = torch.cat([torch.arange(n, device=device) for n in held.counts])[None, None]
    codec = codec_for(fmt.name)
    constants = store.constants if store.constants.shape[0] == 1 else store.constants[row : row + 1]
    keys = codec.read_keys(store.pool.index, store.pool.payload, block, offset, constants)
    values = codec.read_values(store.pool.index, store.pool.payload, block, offset)
    keys, values = leave_coded_domain(fmt, keys.expand(1, fmt.kv_heads, -1, -1), values, constants)
    return keys[0].cpu(), values[0].cpu()


def held_tokens(store, row):
    """All tokens of a row as float32 keys and values [H, n, d], on the CPU: front, pages, recent ones."""
    raw, front = store.window, min(store.config.front, store.window.lengths[row])
    tokens = []
    for pages, full in zip(decoded_pages(store, row), (raw.keys, raw.values), strict=True):
        full = full[row, :, : raw.lengths[row]].float().cpu()
        tokens.append(torch.cat((full[:, :front], pages, full[:, front:]), 1))
    return tokens


def live_tensors(thing, seen=None):
    """Storages of all tensors reachable from an object: address -> bytes."""
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return {}
    seen[id(thing)] = thing  # keeps the object alive, so that its id stays its own
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()} if storage.nbytes() else {}
    if isinstance(thing, dict):
        children = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        children = list(thing)
    elif type(thing).__module__.startswith("selfindex"):
        children = list(vars(thing).values())
    else:
        children = []
    found = {}
    for child in children:
        found |= live_tensors(child, seen)
    return found


def uneven_store(config):
    """Three rows behind padding, with 60, 30 and 5 tokens: 6, 2 and no pages of 8."""
    store = new_store(config, batch=3)
    keys, values, query = random_tokens(store, 60)
    valid = torch.ones(3, 60, dtype=torch.bool)
    valid[1, :30], valid[2, :55] = False, False
    store.append(keys, values, query, valid, 0.125)
    assert [store.encoded(b) for b in range(3)] == [48, 16, 0]
    return store
