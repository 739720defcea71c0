"""Small versions of benchmarks/stream.py: memory is what is accounted, steps read what the budget says."""

import pytest
import torch
from decoded_cache import check_tokens, small_cache
from stores import live_tensors
from tiny_models import forward, pair, prompt


def check_memory(cache):
    layers, accounted = cache.compressed_layers, cache.report().memory.total
    live = sum(sum(live_tensors((layer.store, layer.last)).values()) for layer in layers)
    assert accounted == live
    # Everything but what a page in the making and growth in steps take is proportional to the tokens.
    for layer in layers:
        store, config = layer.store, cache.config
        page = store.format.index_bytes + store.format.payload_bytes
        used = store.pool.used
        assert used == sum(len(row.blocks) for row in store.table.rows)
        assert store.pool.capacity <= used + used // 16 + 1
        assert store.memory().index + store.memory().payload == used * page
        assert store.window.capacity <= config.sinks + config.recent + config.page_size + 32


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_a_long_generation(preset):
    dense, ours = pair("llama")
    cache, ids = small_cache(ours, budget=0.1, preset=preset), prompt(50)
    forward(ours, ids, cache)
    for i in range(200):
        token = prompt(1, seed=i)
        forward(ours, token, cache)
        ids = torch.cat((ids, token), 1)
        if i % 50 == 0:
            check_memory(cache)
            layer = cache.compressed_layers[0]
            encoded, length = layer.store.encoded(0), ids.shape[1]
            # The step selected among what was encoded before it.
            assert layer.read[0] <= -(-length // 10)
            assert layer.read[0] >= min(encoded - 8, length // 10)
    if preset == "balanced":
        check_tokens(cache, dense, ids[0])


def test_ten_turns():
    dense, ours = pair("llama")
    cache, ids = small_cache(ours, budget=9), prompt(3)
    forward(ours, ids, cache)
    for turn in range(10):
        for new in (17, *[1] * 9):
            said = prompt(new, seed=turn)
            forward(ours, said, cache)
            ids = torch.cat((ids, said), 1)
        check_memory(cache)
    check_tokens(cache, dense, ids[0])


@pytest.mark.parametrize("offloading", [False, True])
def test_a_long_prompt_in_pieces(offloading):
    dense, ours = pair("llama")
    cache, ids = small_cache(ours, budget=9, offloading=offloading), prompt(500)
    for part in ids.split(32, 1):
        forward(ours, part, cache)
        if not offloading:
            check_memory(cache)
    check_tokens(cache, dense, ids[0])
