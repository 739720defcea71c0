"""Copies, pickles and the looks of a cache."""

import copy
import io
import pickle

import pytest
import torch
from decoded_cache import small_cache
from tiny_models import forward, pair, prompt

from selfindex import SelfIndexCache, StateError


def filled(family="llama", tokens=60, **options):
    _, ours = pair(family)
    cache = small_cache(ours, budget=9, **options)
    forward(ours, prompt(tokens), cache)
    return ours, cache


@pytest.mark.parametrize(
    "write", [pickle.dumps, lambda x: torch.save(x, io.BytesIO())], ids=["pickle", "torch"]
)
@pytest.mark.parametrize("part", [lambda cache: cache, lambda cache: cache.layers[0]], ids=["cache", "layer"])
def test_a_pickle_is_refused_and_points_to_save(write, part):
    _, cache = filled()
    with pytest.raises(StateError, match=r"cache\.save\(model, path\)"):
        write(part(cache))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_shallow_copy_is_a_fork(family):
    ours, cache = filled(family)
    wanted, copied = copy.deepcopy(cache), copy.copy(cache)
    assert copied.compressed_layers[0].store.pool is cache.compressed_layers[0].store.pool
    forward(ours, prompt(30, seed=1), copied)
    for new in (20, 1):
        assert torch.equal(forward(ours, prompt(new), cache), forward(ours, prompt(new), wanted))
    assert (cache.get_seq_length(), copied.get_seq_length()) == (81, 90)


def test_a_layer_has_no_copy_of_its_own():
    _, cache = filled()
    with pytest.raises(StateError, match="copy the cache"):
        copy.copy(cache.layers[0])


def test_initialized_means_that_tokens_are_held(tmp_path):
    ours, cache = filled()

    def check(one, held):
        assert one.is_initialized == held
        assert [layer.is_initialized for layer in one.layers] == [held] * 2

    cache.save(ours, tmp_path / "prefix")
    empty = small_cache(ours)
    for one in (empty, empty.fork(), copy.deepcopy(empty)):
        check(one, False)
    for one in (cache, cache.fork(), copy.deepcopy(cache), SelfIndexCache.load(ours, tmp_path / "prefix")):
        check(one, True)
        one.crop(-10)
        check(one, True)
        one.crop(-60)
        check(one, False)
        forward(ours, prompt(3), one)
        check(one, True)
        one.reset()
        check(one, False)


def test_a_first_step_that_fails_initializes_nothing(monkeypatch):
    _, ours = pair("llama")
    cache = small_cache(ours)
    monkeypatch.setattr(type(cache), "check_module", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        forward(ours, prompt(20), cache)
    assert not any(layer.is_initialized for layer in cache.layers)
    assert "empty" in repr(cache)


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_a_person_can_read_what_a_cache_is(preset):
    _, cache = filled(preset=preset)
    size = cache.report().memory.total / 2**20
    start = f"SelfIndexCache(preset='{preset}', budget=9, 2 of 2 layers compressed, "
    assert repr(cache) == f"{start}rows=1, tokens=60, {size:.2f} MiB)"
    encoded = cache.report().layers[1].encoded
    assert (
        repr(cache.layers[1])
        == f"SelfIndexLayer(1, rows=1, tokens=60, encoded={encoded}, {size / 2:.2f} MiB)"
    )
    cache.guard.interrupted = True
    assert "tokens=60" in str(cache)
    cache.reset()
    assert repr(cache) == f"{start}empty)"
    assert repr(cache.layers[0]) == "SelfIndexLayer(0, empty)"
