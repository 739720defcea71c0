"""With the payload in host memory every result is the same, bit for bit."""

import copy

import pytest
import torch
from decoded_cache import small_cache
from safetensors.torch import load_file
from tiny_models import forward, generate, pair, prompt

import selfindex
from selfindex import ConfigError, SelfIndexCache, SelfIndexConfig
from selfindex.attention import attend


def both(model, **options):
    """(cache in one place, cache with its payload in host memory)."""
    return [small_cache(model, budget=9, offloading=offloading, **options) for offloading in (False, True)]


def check_same(model, caches, new=(1, 3, 20, 1), batch=1):
    for i, n in enumerate(new):
        got, wanted = (forward(model, prompt(n, batch, seed=50 + i), cache) for cache in caches)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"pinned_tokens": 5}], ids=str)
def test_steps_chunks_and_crops(family, options):
    _, ours = pair(family)
    caches = both(ours, **options)
    for cache in caches:
        forward(ours, prompt(61), cache)
    check_same(ours, caches)
    if family == "llama":
        for cache in caches:
            cache.crop(-20)
        check_same(ours, caches)


def test_rows_that_share_pages():
    _, ours = pair("llama")
    caches = both(ours)
    for cache in caches:
        forward(ours, prompt(61), cache)
        cache.batch_repeat_interleave(3)
    check_same(ours, caches, batch=3)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([2, 0]))
    check_same(ours, caches, batch=2)


def test_two_continuations_of_one_prompt():
    _, ours = pair("llama")
    cache = both(ours)[1]
    forward(ours, prompt(61), cache)
    forked = copy.deepcopy(cache)
    assert forked.compressed_layers[0].store.pool.offloading
    wanted = forward(ours, prompt(20, seed=1), copy.deepcopy(cache))
    forward(ours, prompt(20, seed=2), forked)
    assert torch.equal(forward(ours, prompt(20, seed=1), cache), wanted)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generate(options):
    _, ours = pair("llama")
    one, other = (generate(ours, prompt(40, 2), c, max_new_tokens=20, **options) for c in both(ours))
    assert torch.equal(one, other)


def test_generate_of_the_loop():
    _, ours = pair("llama")
    one, other = (selfindex.generate(ours, prompt(40, 2), cache=c, max_new_tokens=40) for c in both(ours))
    assert torch.equal(one, other)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True, None])
def test_a_file_can_be_loaded_into_either_kind(before, after, tmp_path):
    _, ours = pair("llama")
    caches = both(ours)
    for i, cache in enumerate(caches):
        forward(ours, prompt(61), cache)
        cache.save(ours, tmp_path / str(i))
    files = [load_file(tmp_path / str(i)) for i in range(2)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(x, files[1][name]) for name, x in files[0].items())
    loaded = SelfIndexCache.load(ours, tmp_path / str(int(before)), after)
    wanted = before if after is None else after
    assert loaded.config.offloading == wanted
    assert loaded.compressed_layers[0].store.pool.offloading == wanted
    check_same(ours, [loaded, caches[0]])


@pytest.mark.parametrize("staged", [1, 2, 5])
def test_many_queries_attend_to_pages_a_few_at_a_time(staged, monkeypatch):
    _, ours = pair("llama")
    caches = both(ours)
    ids = prompt(61, 2)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0  # rows of different length: the second has no page in the last parts
    monkeypatch.setattr(attend, "STAGED_PAGES", staged)
    for cache in caches:
        forward(ours, ids, cache, mask)
    mask = torch.cat((mask, mask.new_ones(2, 20)), 1)
    got, wanted = (forward(ours, prompt(20, 2, seed=1), cache, mask) for cache in caches)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_the_report_says_what_is_in_host_memory():
    _, ours = pair("llama")
    caches = both(ours)
    for cache in caches:
        forward(ours, prompt(61), cache)
    resident, offloaded = (cache.report() for cache in caches)
    assert resident.memory.host == 0
    assert "host memory" not in str(resident)
    pools = [layer.store.pool for layer in caches[1].compressed_layers]
    assert offloaded.memory.host == sum(pool.payload.nbytes for pool in pools) > offloaded.memory.payload
    assert f"{offloaded.memory.host / 2**20:.2f} MiB of it in host memory, 0.00 MiB" in str(offloaded)
    assert offloaded.to_dict()["layers"][0]["memory"]["host"] == pools[0].payload.nbytes


def test_the_option_is_checked():
    with pytest.raises(ConfigError, match="offloading must be True or False"):
        SelfIndexConfig(offloading="cpu")
