"""What transformers and users call on a cache between steps."""

import copy

import numpy as np
import pytest
import torch
from decoded_cache import check_tokens, decoded_cache, full_cache, small_cache
from tiny_models import HYBRIDS, forward, pair, prompt
from transformers import DynamicCache

from selfindex import InputError, StateError

TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.mark.parametrize("family", ["llama", "phi3", *HYBRIDS])
@pytest.mark.parametrize("remove", [1, 4, 12])
def test_crop_equals_never_having_had_the_tokens(family, remove):
    # The window of hybrids is 16: they can go back only while it has not been full.
    _, ours = pair(family)
    ids = prompt(14)
    cache, never = small_cache(ours), small_cache(ours)
    forward(ours, ids, cache)
    cache.crop(-remove)
    forward(ours, ids[:, : 14 - remove], never)
    assert cache.get_seq_length() == 14 - remove
    for new in (2, 1):
        got, wanted = (forward(ours, prompt(new, seed=new), c) for c in (cache, never))
        torch.testing.assert_close(got, wanted, **TOLERANCE)


@pytest.mark.parametrize("remove", [1, 6, 8, 13, 40, 55])
def test_crop_over_pages_forgets_the_tokens(remove):
    dense, ours = pair("llama")
    ids = prompt(60)
    cache = full_cache(ours)
    forward(ours, ids, cache)
    cache.crop(-remove)
    check_tokens(cache, dense, ids[0, : 60 - remove])
    wanted = forward(dense, prompt(2, seed=2), decoded_cache(cache, dense))
    torch.testing.assert_close(forward(ours, prompt(2, seed=2), cache), wanted, **TOLERANCE)
    # And it goes on from there.
    for _ in range(20):
        forward(ours, prompt(1), cache)
    sequence = torch.cat((ids[0, : 60 - remove], prompt(2, seed=2)[0], prompt(1)[0].repeat(20)))
    check_tokens(cache, dense, sequence)


def test_crop_within_the_window_equals_never_having_had_the_tokens_over_pages():
    _, ours = pair("llama")
    ids = prompt(63)
    cache, never = small_cache(ours, budget=9), small_cache(ours, budget=9)
    forward(ours, ids, cache)
    forward(ours, ids[:, :62], never)
    # Both hold the same pages, since 62 tokens push out as many as 63.
    cache.crop(-1)
    got, wanted = (forward(ours, ids[:, 62:], c) for c in (cache, never))
    torch.testing.assert_close(got, wanted, **TOLERANCE)


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("remove", [1, 5])
def test_crop_of_a_hybrid_beyond_its_window_needs_past_recording(family, remove):
    dense, ours = pair(family)
    cache, never = small_cache(ours), small_cache(ours)
    ids = prompt(40)
    for c in (cache, never):
        forward(ours, ids, c)
    before = [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(StateError, match="activate_past_recording"):
        cache.crop(-remove)
    assert [layer.get_seq_length() for layer in cache.layers] == before
    cache.crop(0)
    cache.activate_past_recording()
    forward(ours, prompt(6, seed=6), cache)
    cache.crop(-remove)
    forward(ours, prompt(6, seed=6)[:, : 6 - remove], never)
    # The caches may have encoded other pages, but the sliding layers must agree.
    window = cache.layers[0].keys.shape[2]
    torch.testing.assert_close(cache.layers[0].keys, never.layers[0].keys[:, :, -window:])
    assert [layer.get_seq_length() for layer in cache.layers] == [46 - remove] * 3
    wanted = forward(dense, prompt(1), decoded_cache(cache, dense))
    cache.set_budget(1.0)
    torch.testing.assert_close(forward(ours, prompt(1), cache), wanted, **TOLERANCE)


@pytest.mark.parametrize("family", HYBRIDS)
def test_crop_to_nothing_is_always_possible(family):
    dense, ours = pair(family)
    cache = small_cache(ours)
    forward(ours, prompt(40, 2), cache)
    cache.crop(-40)
    assert torch.equal(forward(ours, prompt(30), cache), forward(dense, prompt(30)))


@pytest.mark.parametrize("keep", [1, 20, 59])
def test_positive_crop_keeps_that_many(keep):
    dense, ours = pair("llama")
    cache = full_cache(ours)
    forward(ours, prompt(60), cache)
    cache.crop(keep)
    check_tokens(cache, dense, prompt(60)[0, :keep])


@pytest.mark.parametrize("amount", [-60, -1000])
def test_crop_to_nothing_is_an_empty_cache(amount):
    dense, ours = pair("llama")
    cache = full_cache(ours)
    forward(ours, prompt(60), cache)
    cache.crop(amount)
    assert cache.get_seq_length() == 0
    assert torch.equal(forward(ours, prompt(30, seed=1), cache), forward(dense, prompt(30, seed=1)))
    check_tokens(cache, dense, prompt(30, seed=1)[0])


def test_crop_by_a_tensor_as_transformers_5_17_calls_it():
    dense, ours = pair("llama")
    cache, amount = full_cache(ours), torch.tensor(-4)
    forward(ours, prompt(60), cache)
    cache.crop(amount)
    forward(ours, prompt(3, seed=3), cache)
    assert amount.item() == -4
    check_tokens(cache, dense, torch.cat((prompt(60)[:, :56], prompt(3, seed=3)), 1)[0])


def test_crop_by_nothing_and_of_an_empty_cache_do_nothing():
    dense, ours = pair("llama")
    cache = full_cache(ours)
    cache.crop(-3)
    assert cache.get_seq_length() == 0
    forward(ours, prompt(60), cache)
    cache.crop(0)
    check_tokens(cache, dense, prompt(60)[0])


@pytest.mark.parametrize("keep", [60, 61, 10**6])
def test_crop_to_more_than_there_is_keeps_everything(keep):
    dense, ours = pair("llama")
    cache = full_cache(ours)
    forward(ours, prompt(60), cache)
    cache.crop(keep)
    check_tokens(cache, dense, prompt(60)[0])


@pytest.mark.parametrize(
    "amount", [-4, np.int64(-4), torch.tensor(-4), torch.tensor([-4], dtype=torch.int32)]
)
def test_crop_takes_any_integer(amount):
    _, ours = pair("llama")
    cache = full_cache(ours)
    forward(ours, prompt(60), cache)
    cache.crop(amount)
    assert cache.get_seq_length() == 56


@pytest.mark.parametrize(
    "amount",
    [-4.0, "4", None, True, [4, 4], torch.tensor([-4, -4]), torch.tensor(-4.0), torch.tensor(True)],
    ids=str,
)
def test_what_is_no_integer_crops_nothing(refuses, used, amount):
    refuses(lambda: used[2].crop(amount), InputError, "crop takes one integer")


@pytest.mark.parametrize("repeats", [1.5, "2", True, torch.tensor([1, 2])], ids=str)
def test_rows_are_repeated_a_whole_number_of_times(refuses, used, repeats):
    refuses(lambda: used[2].batch_repeat_interleave(repeats), InputError, "repeated one integer")


@pytest.mark.parametrize("amount", [-3, 0, 3])
def test_crop_of_an_empty_cache_leaves_it_empty(amount):
    dense, ours = pair("gemma3")
    cache = full_cache(ours)
    cache.crop(amount)
    assert cache.get_seq_length() == 0
    assert torch.equal(forward(ours, prompt(30, 2), cache), forward(dense, prompt(30, 2)))


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("crop", -1),
        ("reorder_cache", torch.tensor([0])),
        ("batch_select_indices", torch.tensor([0])),
        ("batch_repeat_interleave", 2),
    ],
)
def test_one_layer_does_not_change_on_its_own(refuses, used, method, argument):
    layer = used[2].layers[0]
    refuses(lambda: getattr(layer, method)(argument), StateError, f"call the cache's {method}")


def test_crop_before_the_padding_of_a_right_padded_batch():
    _, ours = pair("llama")
    ids, mask = prompt(20, 2), torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    cache, never = small_cache(ours, recent=100), small_cache(ours, recent=100)
    forward(ours, ids, cache, mask)
    cache.crop(-8)
    forward(ours, ids[:, :12], never)
    for later in (None, torch.ones(2, 14, dtype=torch.long)):
        got = forward(ours, prompt(1, 2), cache, later)
        torch.testing.assert_close(got, forward(ours, prompt(1, 2), never), **TOLERANCE)


def test_crop_of_a_left_padded_batch():
    dense, ours = pair("llama")
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :25] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache = full_cache(ours)
    forward(ours, prompt(60, 2), cache, mask, position_ids=position)
    cache.crop(-30)
    for row, sequence in ((0, prompt(60, 2)[0, :30]), (1, prompt(60, 2)[1, 25:30])):
        check_tokens(cache, dense, sequence, row)


def test_reset_is_a_new_cache():
    _, ours = pair("gemma3")
    cache, fresh = full_cache(ours), full_cache(ours)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, :9] = 0
    forward(ours, prompt(40, 3), cache, mask)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.report().memory.total == 0
    for new in (30, 1, 2):
        ids = prompt(new, 2, seed=new)
        assert torch.equal(forward(ours, ids, cache), forward(ours, ids, fresh))


@pytest.mark.parametrize("family", ["llama", "olmo3"])
@pytest.mark.parametrize("preset", ["balanced", "paper"])
@pytest.mark.parametrize("how", ["reorder", "select", "select_bool", "repeat"])
def test_rows_change_places(family, preset, how):
    dense, ours = pair(family)
    mask = torch.ones(3, 50, dtype=torch.long)
    mask[1, :9] = 0
    cache = full_cache(ours, preset=preset)
    forward(ours, prompt(50, 3), cache, mask)
    before = decoded_cache(cache, dense)
    if how == "reorder":
        order = torch.tensor([2, 2, 1])
        cache.reorder_cache(order)
    elif how == "select":
        order = torch.tensor([1, 0])
        cache.batch_select_indices(order)
    elif how == "select_bool":
        order = torch.tensor([1, 2])
        cache.batch_select_indices(torch.tensor([False, True, True]))
    else:
        order = torch.arange(3).repeat_interleave(2)
        cache.batch_repeat_interleave(2)
    for layer in before.layers:
        layer.keys, layer.values = layer.keys[order], layer.values[order]
    ids = prompt(1, len(order), seed=4)
    mask = torch.cat((mask[order], torch.ones(len(order), 1, dtype=torch.long)), 1)
    got, wanted = forward(ours, ids, cache, mask), forward(dense, ids, before, mask)
    torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_selecting_the_rows_without_padding_ends_the_padding():
    _, ours = pair("llama")
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[1, :9] = 0
    cache = small_cache(ours)
    forward(ours, prompt(30, 3), cache, mask)
    cache.batch_select_indices(torch.tensor([0, 2]))
    for new in (31, 32):
        logits = forward(ours, prompt(1, 2), cache, torch.ones(2, new, dtype=torch.long))
        assert torch.isfinite(logits).all()


def test_budget_may_change_between_steps():
    _, ours = pair("llama")
    cache = small_cache(ours, budget=5)
    forward(ours, prompt(60), cache)
    for budget, read in ((5, 5), (0.5, 31), (1.0, 48)):
        cache.set_budget(budget)
        forward(ours, prompt(1), cache)
        assert cache.compressed_layers[0].read == [read]


def test_budget_set_before_the_first_step_holds():
    _, ours = pair("llama")
    cache = small_cache(ours, budget=5)
    cache.set_budget(7)
    forward(ours, prompt(60), cache)
    forward(ours, prompt(1), cache)
    assert cache.compressed_layers[1].read == [7]


def test_a_profile_gives_the_same_cache(tmp_path):
    _, ours = pair("llama")
    first = small_cache(ours, budget=7)
    forward(ours, prompt(60), first)
    first.profile().save(tmp_path / "profile")
    again = small_cache(ours, budget=7, profile=tmp_path / "profile")
    forward(ours, prompt(60), again)
    assert torch.equal(forward(ours, prompt(1), first), forward(ours, prompt(1), again))


def test_a_copy_of_a_cache_goes_its_own_way():
    # How transformers' documentation shares a prompt between conversations.
    dense, ours = pair("gemma3")
    shared = full_cache(ours)
    forward(ours, prompt(60), shared)
    one, other = copy.deepcopy(shared), copy.deepcopy(shared)
    wanted = forward(dense, prompt(1), decoded_cache(shared, dense))
    for cache in (one, other, shared):
        torch.testing.assert_close(forward(ours, prompt(1), cache), wanted, **TOLERANCE)
    forward(ours, prompt(30), one)
    assert (one.get_seq_length(), other.get_seq_length()) == (91, 61)


def test_sequence_length_counts_positions():
    _, ours = pair("llama")
    cache = small_cache(ours)
    assert cache.get_seq_length() == 0
    forward(ours, prompt(60), cache)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tokens", [0, 40])
def test_what_transformers_asks_a_cache_is_answered_as_its_own_does(family, tokens):
    dense, ours = pair(family)
    cache, plain = small_cache(ours), DynamicCache(config=dense.config)
    if tokens:
        forward(ours, prompt(tokens, 2), cache)
        forward(dense, prompt(tokens, 2), plain)
    assert len(cache) == len(plain)
    asked = ["is_compileable", "is_croppable", "is_sliding", "is_linear", "batch_size"]
    for name in [name for name in (*asked, "max_batch_size", "is_dummy") if hasattr(plain, name)]:
        assert getattr(cache, name) == getattr(plain, name), name
    calls = [("get_max_length", ()), ("get_seq_length", ()), ("get_seq_length", (99,))]
    for i in range(len(plain)):
        calls += [(name, (i,)) for name in ("get_seq_length", "get_max_length", "get_query_offset")]
        calls += [("get_mask_sizes", (new, i)) for new in (1, 7)]
    if hasattr(plain, "get_max_cache_shape"):
        calls += [("get_max_cache_shape", ())]
    for name, arguments in calls:
        assert getattr(cache, name)(*arguments) == getattr(plain, name)(*arguments), (name, arguments)


def test_keys_and_values_cannot_be_listed(used):
    with pytest.raises(StateError, match="cannot be listed"):
        list(used[2])
    with pytest.raises(TypeError, match="not subscriptable"):
        used[2][0]


@pytest.mark.parametrize(
    "modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_steps_may_run_with_and_without_inference_mode(modes):
    _, ours = pair("llama")
    cache, reference = small_cache(ours, budget=9), small_cache(ours, budget=9)
    for new in (40, *[1] * 10):
        for mode in modes:
            with mode():
                got = forward.__wrapped__(ours, prompt(new), cache)
            assert torch.equal(got, forward(ours, prompt(new), reference))
