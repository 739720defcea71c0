"""Masks that the cache understands, and masks that it refuses."""

import pytest
import torch
from decoded_cache import check_tokens, decoded_cache, full_cache, small_cache
from stores import held_tokens
from tiny_models import forward, pair, prompt
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache

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


@pytest.mark.parametrize("positions", [1, 59, 64])
def test_a_mask_of_another_length(used, refuses, positions):
    mask = torch.ones(1, positions, dtype=torch.long)
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


def packed(*lengths):
    """Sequences one after another, each of which sees only itself."""
    return torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()[None, None]


def _changed(mask, row, column, seen):
    mask[0, 0, row, column] = seen
    return mask


NOT_FOR_US = {
    "packed": (lambda: packed(12, 8), "not causal"),
    "packed, the last of one token": (lambda: packed(19, 1), "not causal"),
    "window": (lambda: causal(20, 0).triu(-9), "not causal"),
    "tree": (lambda: _changed(causal(20, 0), 19, 18, False), "not causal"),
    "columns differ": (lambda: _changed(causal(20, 0), 15, 3, False), "not causal"),
    "per head": (lambda: causal(20, 0).expand(-1, 4, -1, -1), r"expected \[batch, 1"),
    "bias": (lambda: torch.where(causal(20, 0), torch.arange(20.0), -torch.inf), "bias"),
    "not a number": (lambda: torch.where(causal(20, 0), 0.0, torch.nan), "bias"),
    "integers": (lambda: causal(20, 0).long(), "int64"),
    "without data": (lambda: causal(20, 0).to("meta"), "with data"),
    "rows": (lambda: causal(20, 0).expand(3, -1, -1, -1), "3 rows"),
    "three dimensions": (lambda: causal(20, 0)[:, 0].tril(-1), "Error|attention_mask"),
    "flex": (
        lambda: create_block_mask(lambda b, h, q, k: q >= k, 1, None, 20, 20, device="cpu"),
        "BlockMask",
    ),
}


@pytest.mark.parametrize("kind", NOT_FOR_US)
@pytest.mark.parametrize("past", [0, 60])
def test_masks_of_other_kinds(kind, past):
    make, match = NOT_FOR_US[kind]
    dense, ours = pair("llama")
    cache, mask = full_cache(ours), make()
    if past:
        forward(ours, prompt(60), cache)
        if isinstance(mask, torch.Tensor):
            seen = torch.zeros if mask.is_floating_point() else torch.ones
            mask = torch.cat((seen(*mask.shape[:-1], 60, dtype=mask.dtype, device=mask.device), mask), -1)
    error = Exception if kind == "three dimensions" else InputError
    with pytest.raises(error, match=None if kind == "three dimensions" else match):
        forward(ours, prompt(20, seed=1), cache, mask)
    if past:
        cache.crop(60)
        check_tokens(cache, dense, prompt(60)[0])
    else:
        assert torch.equal(forward(ours, prompt(30, 2), cache), forward(dense, prompt(30, 2)))


FILLER = {
    "nothing": lambda rows, at: rows,
    "themselves": lambda rows, at: rows | at,
    "everything": lambda rows, at: torch.ones_like(rows),
    "tokens before": None,
}


# On the right no kernel needs more, and the mask alone does not tell such padding from tokens.
@pytest.mark.parametrize(
    ("side", "padding"), [*(("left", x) for x in FILLER), ("right", "nothing"), ("right", "tokens before")]
)
@pytest.mark.parametrize("additive", [None, torch.finfo(torch.float32).min, -1e4, -torch.inf])
def test_what_padding_sees_in_a_four_dimensional_mask(padding, side, additive):
    dense, ours = pair("llama")
    real = torch.ones(1, 30, dtype=torch.bool)
    real[0, : 7 if side == "left" else None][-7 if side == "right" else 0 :] = False
    mask = causal(30, 0) & real[:, None, None]
    if FILLER[padding] is not None:
        empty = torch.zeros(30, dtype=torch.bool)
        for i in (~real[0]).nonzero().flatten():
            mask[0, 0, i] = FILLER[padding](empty, torch.arange(30) == i)
    cache, ids = full_cache(ours), prompt(30)
    if additive is not None:
        mask = torch.where(mask, 0.0, additive)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    forward(ours, ids, cache, mask, position_ids=positions)
    assert torch.equal(cache.positions, real)
    check_tokens(cache, dense, ids[real])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prefix", [12, 40])
def test_tokens_of_the_first_chunk_may_see_later_ones(attention, prefix):
    dense, ours = pair("llama", attention=attention)
    mask = causal(40, 0).expand(2, -1, -1, -1).clone()
    mask[:, :, :prefix, :prefix] = True
    mask[1, :, :, :3] = mask[1, :, :3] = False  # padding before it
    given = mask if attention == "sdpa" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    ours_too, cache = DynamicCache(config=dense.config), full_cache(ours)
    wanted = forward(dense, prompt(40, 2), ours_too, given)
    assert torch.equal(forward(ours, prompt(40, 2), cache, given)[0], wanted[0])
    assert [cache.layers[1].store.length(b) for b in range(2)] == [40, 37]
    positions = torch.cat((mask[:, 0, -1], torch.ones(2, 1, dtype=torch.bool)), 1).long()
    wanted = forward(dense, prompt(1, 2), decoded_cache(cache, dense), positions)
    torch.testing.assert_close(forward(ours, prompt(1, 2), cache, positions), wanted, atol=2e-4, rtol=2e-4)


def test_packed_sequences_that_only_flash_attention_hears_of(used, refuses):
    lengths = {"cu_seq_lens_q": torch.tensor([0, 2, 4]), "cu_seq_lens_k": torch.tensor([0, 2, 4])}
    refuses(lambda: forward(used[1], prompt(4), used[2], **lengths), InputError, "cu_seq_lens_q")


def test_a_row_without_new_tokens_says_nothing_of_earlier_ones(llama):
    dense, ours = llama
    cache, mask = full_cache(ours), causal(4, 60).expand(2, -1, -1, -1).clone()
    forward(ours, prompt(60, 2), cache)
    mask[1] = False
    forward(ours, prompt(4, 2, seed=1), cache, mask)
    assert [cache.layers[1].store.length(b) for b in range(2)] == [64, 60]
    check_tokens(cache, dense, prompt(60, 2)[1], 1)
