"""Rows of a batch do not depend on each other: each measures the balance of its own tokens."""

import backends
import pytest
import torch
from decoded_cache import small_cache
from tiny_models import forward, generate, pair, prompt

from selfindex import InputError, SelfIndexCache
from selfindex.integrations.transformers import replay

LENGTHS = (60, 37, 14, 24, 59, 44, 28, 5)


def padded(lengths, seed=0):
    """Left-padded prompts of these lengths, and their mask."""
    rows = [prompt(n, seed=seed + i)[0] for i, n in enumerate(lengths)]
    ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, -len(row) :], mask[b, -len(row) :] = row, 1
    return rows, ids, mask


def step_of(mask, new=1):
    return torch.cat((mask, mask.new_ones(len(mask), new)), 1)


@backends.on_cpu
@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"pinned_tokens": 5}], ids=str)
@pytest.mark.parametrize("fixed", [False, True])
def test_a_reply_is_the_same_in_any_company(backend, options, fixed):
    _, ours = pair("llama")
    rows, ids, mask = padded(LENGTHS)
    cache = small_cache(ours, budget=12, **options)
    cache.replay.emulate = fixed
    together = generate(ours, ids, cache, attention_mask=mask, max_new_tokens=24)
    for b, row in enumerate(rows):
        alone = small_cache(ours, budget=12, **options)
        alone.replay.emulate = fixed
        reply = generate(ours, row[None], alone, max_new_tokens=24)
        assert torch.equal(together[b, -24:], reply[0, -24:]), b
        if (own := alone.compressed_layers[0].store.constants) is not None:
            found = cache.compressed_layers[0].store.constants[b]
            torch.testing.assert_close(found, own[0], atol=1e-4, rtol=1e-4)
    assert (cache.replay.steps > 10) == fixed


def recordings(cache, model, steps, monkeypatch):
    """How often a step is recorded after padded prompts."""
    made, record = [], replay.Replay._record
    monkeypatch.setattr(replay.Replay, "_record", lambda *args: made.append(1) or record(*args))
    _, ids, mask = padded((40, 14, 3))
    cache.replay.emulate = True
    forward(model, ids, cache, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for layer in cache.compressed_layers:
        layer.store.reserve(100, 0)  # pages for all steps: no pool moves
    for i in range(steps):
        mask = step_of(mask)
        forward(model, prompt(1, 3, seed=i), cache, mask, position_ids=mask.sum(1, keepdim=True) - 1)
    assert cache.replay.steps == steps
    return len(made)


def test_steps_in_which_rows_fix_their_balance_are_recorded_twice(llama, tmp_path, monkeypatch):
    """While queries count for it, and from then on."""
    ours, steps = llama[1], 50
    cache = small_cache(ours, budget=12)
    found = recordings(cache, ours, steps, monkeypatch)
    cache.profile().save(tmp_path / "profile")
    shared = small_cache(ours, budget=12, profile=tmp_path / "profile")
    assert found <= recordings(shared, ours, steps, monkeypatch) + 1
    eager = small_cache(ours, budget=12)
    _, ids, mask = padded((40, 14, 3))
    forward(ours, ids, eager, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for i in range(steps):
        mask = step_of(mask)
        forward(ours, prompt(1, 3, seed=i), eager, mask, position_ids=mask.sum(1, keepdim=True) - 1)
    for one, other in zip(cache.compressed_layers, eager.compressed_layers, strict=True):
        assert one.store.statistics.has_constants == (True, True, True)
        assert one.store.statistics.queries_seen == other.store.statistics.queries_seen
        torch.testing.assert_close(one.store.constants, other.store.constants, atol=1e-4, rtol=1e-4)


def test_a_profile_of_several_rows_is_their_mean(llama):
    cache = small_cache(llama[1])
    _, ids, mask = padded((40, 30, 3))
    forward(llama[1], ids, cache, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for layer, balance in zip(cache.compressed_layers, cache.profile().balance.values(), strict=True):
        one, other, none = layer.store.constants
        assert torch.equal(none, torch.ones_like(none))  # nothing is encoded
        torch.testing.assert_close(balance, (one * other).sqrt())


def test_a_pass_that_is_taken_back_has_fixed_nothing(llama):
    cache = small_cache(llama[1], sinks=4, recent=8)
    forward(llama[1], prompt(15, 2), cache)
    store = cache.compressed_layers[1].store
    before = store.statistics
    hook = llama[1].model.layers[1].self_attn.k_proj.register_forward_hook(lambda *args: args[2] * torch.nan)
    with pytest.raises(InputError):
        forward(llama[1], prompt(20, 2), cache)
    hook.remove()
    cache.crop(15)
    assert store.statistics == before
    wanted = small_cache(llama[1], sinks=4, recent=8)
    forward(llama[1], prompt(15, 2), wanted)
    for other in (cache, wanted):
        forward(llama[1], prompt(20, 2), other)
    assert torch.equal(store.constants, wanted.compressed_layers[1].store.constants)


def test_a_prefix_with_many_questions_keeps_its_constants(llama, tmp_path):
    cache = small_cache(llama[1], budget=9)
    forward(llama[1], prompt(60), cache)
    cache.save(llama[1], tmp_path / "prefix")
    many = SelfIndexCache.load(llama[1], tmp_path / "prefix")
    many.batch_repeat_interleave(3)
    one, store = cache.compressed_layers[0].store, many.compressed_layers[0].store
    assert torch.equal(store.constants, one.constants.expand(3, -1, -1))
    ids = prompt(1)
    got = forward(llama[1], ids.expand(3, -1), many)
    torch.testing.assert_close(got, forward(llama[1], ids, cache).expand(3, -1, -1), atol=1e-4, rtol=1e-4)
