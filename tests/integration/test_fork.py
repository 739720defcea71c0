"""One prefix, many requests: forks share its pages, and each goes on by itself."""

import copy
import gc

import backends
import pytest
import torch
from backends import scaled
from decoded_cache import small_cache
from threads import at_once
from tiny_models import forward, generate, pair, prompt

from selfindex import StateError

pytestmark = backends.every


def prefix(family="llama", tokens=60, batch=1, **options):
    _, ours = pair(family)
    cache = small_cache(ours, budget=9, **options)
    forward(ours, prompt(scaled(tokens), batch=batch), cache)
    return ours, cache


def check_same(got, wanted):
    """Equal; on a GPU, where a product may be split in another way, but for rounding."""
    tolerance = 1e-4 if backends.current.device == "cuda" else 0
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize(
    "options", [{}, {"preset": "paper"}, {"offloading": True}, {"pinned_tokens": 5}], ids=str
)
def test_forks_go_on_like_copies(backend, family, options):
    ours, cache = prefix(family, batch=2, **options)
    copies = [copy.deepcopy(cache) for _ in range(3)]
    forks = [cache.fork(), cache.fork(), cache]
    # In turns, each with another tail, with pages encoded on the way.
    for turn, new in enumerate((1, 5, 20, 1, 30)):
        for i, (mine, other) in enumerate(zip(forks, copies, strict=True)):
            ids = prompt(new if new < 5 else scaled(12 + new), batch=2, seed=10 * turn + i)
            check_same(forward(ours, ids, mine), forward(ours, ids, other))
    if "preset" not in options:
        backend.check_ran(
            "encode" if "offloading" in options else "encode_into", "sparse_decode", "window_attend"
        )


def test_forks_share_pages_and_release_them():
    ours, cache = prefix(tokens=60)
    store = cache.compressed_layers[0].store
    pool, planes = store.pool, store.pool.payload.data_ptr()
    assert pool.used == 6
    forks = [cache.fork() for _ in range(50)]
    assert pool.used == 6
    assert all(f.compressed_layers[0].store.pool.payload.data_ptr() == planes for f in forks)
    forward(ours, prompt(2 * store.config.page_size), forks[0])
    assert pool.used == 8
    assert [f.report().memory.payload for f in (cache, forks[0])] == [
        2 * pages * store.format.payload_bytes for pages in (6, 8)
    ]
    del store, cache
    gc.collect()
    # The prefix lives as long as anybody uses it.
    assert pool.used == 8
    forks[0].reset()
    assert pool.used == 6
    forks[1].crop(-scaled(30))
    assert pool.used == 6
    forks = forks[:2]
    gc.collect()
    assert pool.used == len(forks[1].compressed_layers[0].store.table.rows[0].blocks) < 6
    forks.clear()
    gc.collect()
    assert pool.used == 0


def test_a_copy_of_a_fork_shares_nothing_and_keeps_nothing_of_others():
    ours, cache = prefix()
    fork = cache.fork()
    forward(ours, prompt(scaled(40)), cache)
    own = copy.deepcopy(fork)
    store = own.compressed_layers[0].store
    assert store.pool is not fork.compressed_layers[0].store.pool
    assert store.pool.used == 6 < cache.compressed_layers[0].store.pool.used
    ids = prompt(scaled(30), seed=2)
    check_same(forward(ours, ids, own), forward(ours, ids, fork))


def test_a_fork_with_padding():
    _, ours = pair("llama")
    mask = torch.ones(2, scaled(40), dtype=torch.long)
    mask[1, : scaled(15)] = 0
    cache = small_cache(ours, budget=9)
    forward(ours, prompt(scaled(40), batch=2), cache, mask)
    fork = cache.fork()
    forward(ours, prompt(1, batch=2), cache, torch.cat((mask, mask.new_ones(2, 1)), 1))
    longer = torch.cat((mask, mask.new_zeros(2, 1), mask.new_ones(2, 1)), 1)
    longer[0] = 1
    assert torch.isfinite(forward(ours, prompt(2, batch=2), fork, longer)).all()
    assert (cache.get_seq_length(), fork.get_seq_length()) == (scaled(40) + 1, scaled(40) + 2)


def test_a_fork_of_an_empty_cache_is_empty():
    _, ours = pair("llama")
    cache = small_cache(ours)
    fork = cache.fork()
    forward(ours, prompt(20), fork)
    assert (cache.get_seq_length(), fork.get_seq_length()) == (0, 20)


def test_forks_in_threads():
    ours, cache = prefix()
    ids = [torch.cat((prompt(scaled(60)), prompt(9, seed=i)), 1) for i in range(4)]
    alone = [generate(ours, x, copy.deepcopy(cache), max_new_tokens=25) for x in ids]
    forks = [cache.fork() for _ in ids]
    together = at_once(4, lambda i: generate(ours, ids[i], forks[i], max_new_tokens=25))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    pool = cache.compressed_layers[0].store.pool
    held = [f.compressed_layers[0].store.table.rows[0].blocks for f in (cache, *forks)]
    assert pool.used == len({block for blocks in held for block in blocks})


def test_a_torn_cache_has_no_forks():
    _, cache = prefix()
    cache.guard.interrupted = True
    with pytest.raises(StateError, match="reset"):
        cache.fork()
