"""Filler that finished rows got is hidden by the mask of the next turn: what is hidden is let go of."""

import pytest
import torch
from decoded_cache import check_tokens, decoded_cache, full_cache, small_cache
from tiny_models import forward, generate, pair, prompt
from transformers import DynamicCache

from selfindex import StateError


def turns(model, cache, filler, **options):
    """Two turns of a batch, whose row 1 ended `filler` tokens before the others."""
    ids = prompt(30, 2)
    out = generate(model, ids, cache, **options)
    mask = torch.ones_like(out)
    mask[1, out.shape[1] - filler :] = 0
    ids = torch.cat((out, prompt(6, 2, seed=3)), 1)
    mask = torch.cat((mask, mask.new_ones(2, 6)), 1)
    return generate(model, ids, cache, attention_mask=mask, **options), mask


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("filler", [1, 5, 12])  # 12: one of them was never fed
def test_equals_the_dense_model_while_nothing_is_encoded(family, filler):
    dense, ours = pair(family)
    cache = small_cache(ours, recent=100)
    wanted, _ = turns(dense, DynamicCache(config=dense.config), filler)
    got, mask = turns(ours, cache, filler)
    assert torch.equal(got, wanted)
    lengths = [layer.store.length(1) for layer in cache.compressed_layers]
    assert lengths == [cache.get_seq_length() - filler] * len(lengths)
    assert torch.equal(cache.positions[:, : mask.shape[1]], mask.bool())


@pytest.mark.parametrize(
    ("hidden", "options"),
    [
        ({1: 5}, {}),
        ({1: 41}, {}),  # into the pages
        ({0: 3, 1: 58}, {"offloading": True}),  # into the sinks
        ({0: 60}, {}),  # all of it
        ({1: 9}, {"preset": "paper"}),
    ],
)
def test_over_pages(hidden, options):
    dense, ours = pair("llama")
    cache = full_cache(ours, **options)
    forward(ours, prompt(45, 2), cache)
    for i in range(15):
        forward(ours, prompt(1, 2, seed=i + 1), cache)
    fork, mask = cache.fork(), torch.ones(2, 64, dtype=torch.long)
    for row, tokens in hidden.items():
        mask[row, 60 - tokens : 60] = 0
    positions = (mask.cumsum(1) - 1)[:, 60:]
    oracle = decoded_cache(cache, dense)
    wanted = forward(dense, prompt(4, 2, seed=20), oracle, mask, position_ids=positions)
    got = forward(ours, prompt(4, 2, seed=20), cache, mask, position_ids=positions)
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)
    for layer in cache.compressed_layers:
        assert [layer.store.length(b) for b in range(2)] == mask.sum(1).tolist()
    mask = torch.cat((mask, mask.new_ones(2, 1)), 1)
    wanted = forward(dense, prompt(1, 2), decoded_cache(cache, dense), mask)
    torch.testing.assert_close(forward(ours, prompt(1, 2), cache, mask), wanted, atol=2e-4, rtol=2e-4)
    # A fork shares the pages, and has lost nothing.
    assert fork.layers[0].store.length(0) == fork.layers[0].store.length(1) == 60
    assert torch.isfinite(forward(ours, prompt(1, 2), fork)).all()


@pytest.mark.parametrize("change", ["inside", "again", "first"])
def test_other_changes_of_the_mask_are_refused(change):
    dense, ours = pair("llama")
    cache, ids = full_cache(ours), prompt(60, 2)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 55:] = 0
    forward(ours, ids, cache, mask)
    before, other = mask.clone(), torch.cat((mask, mask.new_ones(2, 1)), 1)
    if change == "inside":
        other[0, 30:40] = 0
    elif change == "first":
        other[0, :4] = 0
    else:
        other[1, 57] = 1
    with pytest.raises(StateError, match="differs from earlier steps"):
        forward(ours, prompt(1, 2), cache, other)
    cache.crop(60)
    check_tokens(cache, dense, ids[0])
    check_tokens(cache, dense, ids[1, :55], 1)
    assert torch.equal(cache.positions, before.bool())


def test_filler_inside_the_prompt_of_the_paper_preset():
    _, ours = pair("llama")
    cache, mask = full_cache(ours, preset="paper"), torch.ones(1, 61, dtype=torch.long)
    forward(ours, prompt(60), cache)
    mask[0, 55:60] = 0
    with pytest.raises(StateError, match="inside its prompt"):
        forward(ours, prompt(1), cache, mask)
    cache.crop(60)
    assert cache.layers[0].store.length(0) == cache.layers[1].store.length(0) == 60
    assert torch.isfinite(forward(ours, prompt(1), cache)).all()


def test_layers_agree_when_the_pass_that_hides_breaks_off():
    dense, ours = pair("llama")
    cache, mask = full_cache(ours), torch.ones(2, 61, dtype=torch.long)
    forward(ours, prompt(60, 2), cache)
    mask[1, 50:60] = 0

    def stop(*_):
        raise KeyboardInterrupt

    hook = ours.model.layers[0].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        forward(ours, prompt(1, 2), cache, mask)
    hook.remove()
    cache.crop(60)
    for layer in cache.compressed_layers:
        assert [layer.store.length(b) for b in range(2)] == [60, 50]
    check_tokens(cache, dense, prompt(60, 2)[1, :50], 1)
    assert torch.isfinite(forward(ours, prompt(1, 2), cache, mask)).all()
