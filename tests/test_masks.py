"""Masks that the cache understands, and masks that it refuses."""

import pytest
import torch
from decoded_cache import full_cache, small_cache
from stores import held_tokens
from tiny_models import forward, prompt

from selfindex import InputError, StateError


def causal(new, past, fill=True):
    return torch.full((1, 1, new, past + new), fill).tril(past)


def test_a_four_dimensional_causal_mask_is_understood(llama):
    _, ours = llama
    plain, masked, padded = (full_cache(ours) for _ in range(3))
    assert torch.equal(forward(ours, prompt(30), masked, causal(30, 0)), forward(ours, prompt(30), plain))
    got, wanted = forward(ours, prompt(3), masked, causal(3, 30)), forward(ours, prompt(3), plain)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    mask = causal(30, 0).expand(2, -1, -1, -1).clone()
    mask[1, :, :, :7] = False
    forward(ours, prompt(30, 2), padded, mask)
    assert [padded.layers[0].store.length(b) for b in range(2)] == [30, 23]


@pytest.mark.parametrize("new", [1, 4])
def test_a_four_dimensional_mask_that_is_not_causal(used, refuses, new):
    mask = causal(new, 60)
    if new > 1:
        mask[0, 0, 0, -1] = True
    else:
        mask[0, 0, 0, 3] = False
    error = InputError if new > 1 else StateError
    match = "not causal" if new > 1 else "differs from earlier steps"
    refuses(lambda: forward(used[1], prompt(new), used[2], mask), error, match)


def test_a_mask_that_hides_stored_tokens(used, refuses):
    mask = torch.ones(1, 61, dtype=torch.long)
    mask[0, 5] = 0
    refuses(lambda: forward(used[1], prompt(1), used[2], mask), StateError, "differs from earlier steps")


@pytest.mark.parametrize("columns", [1, 59, 64])
def test_a_mask_of_another_length(used, refuses, columns):
    mask = torch.ones(1, columns, dtype=torch.long)
    mask[0, 0] = 0
    refuses(lambda: forward(used[1], prompt(1), used[2], mask), (InputError, StateError), "attention_mask")


def test_a_mask_that_shows_padding_later(llama):
    _, ours = llama
    cache, mask = small_cache(ours), torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    forward(ours, prompt(20, 2), cache, mask)
    before = [held_tokens(cache.layers[0].store, b)[0] for b in range(2)]
    with pytest.raises(StateError, match="earlier steps had padding"):
        forward(ours, prompt(1, 2), cache)
    late = torch.ones(2, 21, dtype=torch.long)
    late[1, :3] = 0
    with pytest.raises(StateError, match="differs from earlier steps"):
        forward(ours, prompt(1, 2), cache, late)
    cache.crop(20)
    assert all(torch.equal(held_tokens(cache.layers[0].store, b)[0], before[b]) for b in range(2))
    mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    assert torch.isfinite(forward(ours, prompt(1, 2), cache, mask)).all()
