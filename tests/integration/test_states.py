"""Layers with a convolution or recurrent state beside compressed ones: rows, crop, reset, forks."""

import families
import pytest
import torch
from decoded_cache import decoded_cache, full_cache, small_cache
from tiny_models import forward, prompt
from transformers import DynamicCache

import selfindex
from selfindex import StateError

RECURRENT = ("qwen3_5_text", "falcon_h1")
"""A state beside the compressed layers, and in the same layer."""
TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


def states(cache):
    """Every tensor of the layers' convolution and recurrent states."""
    return [
        x
        for layer in cache.layers
        for name in ("conv_states", "recurrent_states")
        for x in getattr(layer, name, {}).values()
        if x is not None
    ]


@pytest.mark.parametrize("family", [*RECURRENT, "lfm2"])
@pytest.mark.parametrize(
    ("take", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2])), [2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "mask", "repeat"],
)
def test_states_follow_their_rows(family, take, rows):
    dense, ours = families.pair(family)
    cache = full_cache(ours)
    forward(ours, prompt(40, 3), cache)
    before = states(cache)
    take(cache)
    assert all(torch.equal(new, old[rows]) for new, old in zip(states(cache), before, strict=True))
    ids = prompt(1, len(rows), seed=1)
    wanted = forward(dense, ids, decoded_cache(cache, dense))
    torch.testing.assert_close(forward(ours, ids, cache), wanted, **TOLERANCE)


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("recording", [False, True])
def test_a_recurrent_state_cannot_go_back(family, recording):
    dense, ours = families.pair(family)
    cache = full_cache(ours)
    if recording:
        cache.activate_past_recording()
    forward(ours, prompt(40), cache)
    held = [x.clone() for x in states(cache)]
    assert not cache.is_croppable
    with pytest.raises(StateError, match="recurrent state cannot go back"):
        cache.crop(-3)
    assert cache.get_seq_length() == 40
    assert all(map(torch.equal, states(cache), held))
    cache.crop(0)
    wanted = forward(dense, prompt(1), decoded_cache(cache, dense))
    torch.testing.assert_close(forward(ours, prompt(1), cache), wanted, **TOLERANCE)


def test_convolution_states_go_back_if_the_past_was_recorded():
    dense, ours = families.pair("lfm2")
    cache, reference = small_cache(ours, recent=100), DynamicCache(config=dense.config)
    for one, model in ((cache, ours), (reference, dense)):
        forward(model, prompt(40), one)
    with pytest.raises(StateError, match="activate_past_recording"):
        cache.crop(-3)
    for one, model in ((cache, ours), (reference, dense)):
        one.activate_past_recording()
        forward(model, prompt(5, seed=5), one)
        one.crop(-3)
    assert cache.get_seq_length() == 42
    assert all(map(torch.equal, states(cache), states(reference)))
    assert torch.equal(forward(ours, prompt(2), cache), forward(dense, prompt(2), reference))


@pytest.mark.parametrize("family", [*RECURRENT, "lfm2"])
def test_an_emptied_cache_takes_another_batch(family):
    dense, ours = families.pair(family)
    cache = small_cache(ours, recent=100)
    for empty in (cache.reset, lambda: cache.crop(-1000)):
        forward(ours, prompt(40, 2), cache)
        empty()
        reference = DynamicCache(config=dense.config)
        for ids in (prompt(30, seed=1), prompt(1)):
            assert torch.equal(forward(ours, ids, cache), forward(dense, ids, reference))
        cache.reset()


@pytest.mark.parametrize("family", RECURRENT)
def test_forks_go_on_by_themselves(family):
    dense, ours = families.pair(family)
    cache = full_cache(ours)
    forward(ours, prompt(40), cache)
    fork = cache.fork()
    forward(ours, prompt(2, seed=2), fork)
    wanted = forward(dense, prompt(1), decoded_cache(cache, dense))
    torch.testing.assert_close(forward(ours, prompt(1), cache), wanted, **TOLERANCE)
    wanted = forward(dense, prompt(1), decoded_cache(fork, dense))
    torch.testing.assert_close(forward(ours, prompt(1), fork), wanted, **TOLERANCE)


@pytest.mark.parametrize("family", RECURRENT)
def test_a_step_that_skipped_a_layer_is_noticed(family):
    _, ours = families.pair(family)
    cache = small_cache(ours)
    forward(ours, prompt(40), cache)
    cache.compressed_layers[0].positions += 1
    with pytest.raises(StateError, match="interrupted or layers were called out of order"):
        forward(ours, prompt(1), cache)


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1"])
def test_selfindex_generate_runs_them_step_by_step(family):
    _, ours = families.pair(family)
    ids = prompt(40)
    got = selfindex.generate(ours, ids, cache=small_cache(ours), max_new_tokens=8, eos_token_id=96)
    cache, wanted = small_cache(ours), ids
    for _ in range(8):
        new = wanted if wanted is ids else wanted[:, -1:]
        wanted = torch.cat((wanted, forward(ours, new, cache)[:, -1:].argmax(-1)), 1)
    assert torch.equal(got, wanted)
