"""Mixed precision: what autocast makes of keys, values and queries, and steps with and without it."""

import contextlib

import pytest
import torch
from decoded_cache import decoded_cache, full_cache
from tiny_models import forward, pair, prompt
from transformers import DynamicCache

from selfindex import InputError
from selfindex.store.window import Window

PARTS = (50, 1, 30, 1, 1)


def logits(model, cache, when, dtype):
    """Logits of a conversation whose part i runs under autocast if `when[i]`."""
    found = []
    for i, (tokens, mixed) in enumerate(zip(PARTS, when, strict=True)):
        with torch.autocast("cpu", dtype) if mixed else contextlib.nullcontext():
            found.append(forward(model, prompt(tokens, seed=i), cache).float())
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", ["llama", "smollm3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", [(1, 1, 1, 1, 1), (1, 0, 0, 1, 0), (0, 1, 1, 0, 1)])
def test_autocast_is_as_near_to_float32_as_with_the_dense_cache(family, dtype, when):
    dense, ours = pair(family)
    exact = logits(dense, DynamicCache(config=dense.config), [0] * 5, dtype)
    theirs = logits(dense, DynamicCache(config=dense.config), when, dtype)
    cache = full_cache(ours, recent=200)
    found = logits(ours, cache, when, dtype)
    assert not cache.report().memory.payload  # all that differs is rounding
    assert (found - exact).abs().mean() < 2 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("family", ["llama", "smollm3", "gemma3"])
@pytest.mark.parametrize("preset", ["balanced", "paper"])
@pytest.mark.parametrize("new", [1, 9])
def test_steps_over_pages_that_were_filled_under_autocast(family, preset, new):
    dense, ours = pair(family)
    cache, step = full_cache(ours, preset=preset), prompt(new, seed=9)
    with torch.autocast("cpu", torch.bfloat16):
        forward(ours, prompt(60), cache)
        forward(ours, prompt(1, seed=1), cache)
    exact = forward(dense, step, decoded_cache(cache, dense))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = forward(dense, step, decoded_cache(cache, dense)).float()
        found = forward(ours, step, cache).float()
    assert (found - exact).abs().mean() < 2 * (theirs - exact).abs().mean()


def test_pages_are_the_same_under_autocast():
    _, ours = pair("llama")
    caches = full_cache(ours), full_cache(ours)
    keys, values, query = (torch.randn(1, heads, 60, 64) for heads in (2, 2, 4))
    module = ours.model.layers[0].self_attn
    for cache, mixed in zip(caches, (False, True), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            new, _ = cache.update(keys, values, 0)
            cache.layers[0].attend(
                module, query, new, None, 0.125, None, lambda q, *_: (q.transpose(1, 2), None)
            )
    pools = [cache.layers[0].store.pool for cache in caches]
    assert pools[0].used > 3
    assert torch.equal(pools[0].index, pools[1].index)
    assert torch.equal(pools[0].payload, pools[1].payload)


def test_a_model_narrower_than_what_is_held_needs_autocast():
    _, ours = pair("llama")
    cache = full_cache(ours)
    forward(ours, prompt(60), cache)
    half = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="holds dtype"):
        cache.update(half, half, 0)
    with pytest.raises(InputError, match="share a dtype"):
        cache.update(half.float(), half, 0)
    assert torch.isfinite(forward(ours, prompt(1), cache)).all()


def test_what_is_held_becomes_as_wide_as_what_comes():
    raw = Window(torch.empty(1, 2, 0, 64, dtype=torch.bfloat16))
    one, two = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64)
    raw.append_step(*raw.fitted(one.bfloat16(), one.bfloat16()))
    raw.append_step(*raw.fitted(two, two.bfloat16()))
    keys, values, _ = raw.held()
    assert torch.equal(keys, torch.cat((one.bfloat16(), two), 2))
    assert torch.equal(values, torch.cat((one.bfloat16(), two.bfloat16()), 2).float())
