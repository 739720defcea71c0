"""Every bad input gets one clear exception and leaves the cache as it was."""

import copy

import pytest
import torch
from decoded_cache import check_tokens, full_cache, small_cache
from tiny_models import cache_argument, forward, make_model, pair, prompt
from transformers import DynamicCache

from selfindex import BalanceProfile, InputError, StateError, UnsupportedModelError


def update(cache, keys, values=None, layer=0):
    return cache.update(keys, keys if values is None else values, layer)


KEYS = torch.zeros(1, 2, 3, 64)


@pytest.mark.parametrize(
    ("keys", "values", "match"),
    [
        (KEYS[0], None, "batch, heads, tokens, head_dim"),
        (KEYS, KEYS[:, :, :2], "batch, heads, tokens, head_dim"),
        (KEYS.expand(2, -1, -1, -1), None, "batch of 1, got 2"),
        (KEYS[:, :1], None, "2 heads of 64, got 1 of 64"),
        (torch.zeros(1, 2, 3, 128), None, "2 heads of 64, got 2 of 128"),
        (KEYS.double(), None, "dtype"),
        (KEYS.int(), None, "dtype"),
        (KEYS, KEYS.half(), "dtype"),
        (KEYS.half(), None, "dtype torch.float32, got torch.float16"),
        (KEYS.to("meta"), None, "device cpu, got meta"),
        (KEYS + float("nan"), KEYS, "NaN or infinity"),
        (KEYS, KEYS + float("inf"), "NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(used, refuses, keys, values, match):
    refuses(lambda: update(used[2], keys, values), InputError, match)


@pytest.mark.parametrize("dim", [32, 72, 112])
def test_unsupported_head_size(llama, dim):
    cache = small_cache(llama[1])
    with pytest.raises(InputError, match=rf"head_dim {dim}.*supported are"):
        update(cache, torch.zeros(1, 2, 3, dim))
    assert cache.get_seq_length() == 0


def test_weights_that_make_keys_infinite(llama):
    _, ours = llama
    broken = copy.deepcopy(ours)
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight.fill_(float("inf"))
    other = small_cache(broken)
    with pytest.raises(InputError, match=r"layer 1: .*NaN or infinity"):
        forward(broken, prompt(5), other)


def test_nan_keys_of_a_step_are_refused_when_they_would_be_encoded(used):
    # Single tokens are not checked, for speed; none of them gets into a page.
    dense, ours, cache = used
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.model.embed_tokens.weight[0] = float("nan")
    own = full_cache(broken)
    forward(broken, prompt(60), own)
    forward(broken, torch.tensor([[0]]), own)
    assert own.layers[0].store.encoded(0) == 48

    def go_on():
        for _ in range(20):
            forward(broken, prompt(1), own)

    with pytest.raises(InputError, match="NaN or infinity"):
        go_on()
    own.crop(60)
    check_tokens(own, dense, prompt(60)[0])
    # Another cache of the process is not concerned.
    check_tokens(cache, dense, prompt(60)[0])
    assert torch.isfinite(forward(ours, prompt(1), cache)).all()


@pytest.mark.parametrize("prepared", [True, False])
def test_a_cache_of_another_model(used, refuses, prepared):
    other = make_model("llama", seed=3)
    if prepared:
        small_cache(other)
    match = "another model" if prepared else "not prepared"
    refuses(lambda: forward(other, prompt(1), used[2]), StateError, match)


def test_an_attention_implementation_that_cannot_be_replaced_is_refused_by_the_pass(llama):
    model = copy.deepcopy(llama[0])
    cache = small_cache(model)
    model.set_attn_implementation("eager")
    forward(model, prompt(5), cache)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        forward(model, prompt(1), cache)
    assert model.config._attn_implementation == "flex_attention"
    model.set_attn_implementation("sdpa")
    forward(model, prompt(1), cache)
    assert cache.get_seq_length() == 6


def test_layers_called_out_of_order(used, refuses):
    keys = torch.zeros(1, 2, 1, 64)
    refuses(lambda: update(used[2], keys, layer=1), StateError, "out of order")


@pytest.mark.parametrize("new", [1, 3])
def test_an_interrupted_forward_pass(used, refuses, new):
    _, ours, cache = used

    def stop(*_):
        raise KeyboardInterrupt

    hook = ours.model.layers[1].mlp.register_forward_pre_hook(stop)
    try:
        # Both layers have stored their tokens by now; crop takes them back.
        with pytest.raises(KeyboardInterrupt):
            forward(ours, prompt(new), cache)
    finally:
        hook.remove()
    cache.crop(-new)
    hook = ours.model.layers[0].mlp.register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            forward(ours, prompt(new), cache)
    finally:
        hook.remove()
    # Only the first layer has.
    refuses(lambda: forward(ours, prompt(1), cache), StateError, r"interrupted.*crop\(60\)")


@pytest.mark.parametrize("family", ["olmo3", "gemma3"])
def test_an_interrupted_forward_pass_of_a_hybrid(family):
    _, ours = pair(family)
    cache, never = full_cache(ours), full_cache(ours)

    def stop(*_):
        raise KeyboardInterrupt

    for c in (cache, never):
        forward(ours, prompt(10), c)
    hook = ours.model.layers[1].register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            forward(ours, prompt(1), cache)
    finally:
        hook.remove()
    cache.crop(cache.get_seq_length() and 10)
    got, wanted = (forward(ours, prompt(2), c) for c in (cache, never))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_batch_size_that_changes(used, refuses):
    refuses(lambda: forward(used[1], prompt(1, 2), used[2]), InputError, "batch of 1, got 2")


def test_gradients(used, refuses):
    _, ours, cache = used
    call = {cache_argument(ours): cache}
    refuses(lambda: ours(prompt(1), **call), InputError, "inference")


def test_profile_of_another_model(llama, tmp_path):
    _, ours = llama
    for name, balance in (
        ("layers", {0: torch.ones(2, 64)}),
        ("heads", dict.fromkeys((0, 1), torch.ones(3, 64))),
    ):
        BalanceProfile(balance).save(tmp_path / name)
    with pytest.raises(InputError, match=r"lacks layers \[1\]"):
        small_cache(ours, profile=tmp_path / "layers")
    cache = small_cache(ours, profile=tmp_path / "heads")
    with pytest.raises(InputError, match="another model"):
        forward(ours, prompt(5), cache)


def test_no_profile_before_the_first_page(llama):
    cache = small_cache(llama[1])
    for tokens in (None, 5):
        if tokens:
            forward(llama[1], prompt(tokens), cache)
        with pytest.raises(StateError, match="no balance yet"):
            cache.profile()


def test_offloading_is_refused(used, refuses):
    refuses(lambda: used[2].layers[0].offload(), StateError, "offload")


def test_crop_inside_a_paper_prompt(llama):
    cache = small_cache(llama[1], preset="paper")
    forward(llama[1], prompt(40), cache)
    forward(llama[1], prompt(3), cache)
    with pytest.raises(StateError, match="inside its prompt"):
        cache.crop(-5)
    assert cache.get_seq_length() == 43
    cache.crop(-3)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("preset", ["balanced", "paper"])
@pytest.mark.parametrize("steps", [1, 30])
def test_one_token_prompt(llama, preset, steps):
    dense, ours = llama
    cache, reference = small_cache(ours, preset=preset), DynamicCache(config=dense.config)
    assert torch.equal(forward(ours, prompt(1), cache), forward(dense, prompt(1), reference))
    for i in range(steps):
        got, wanted = forward(ours, prompt(1, seed=i), cache), forward(dense, prompt(1, seed=i), reference)
        if i == 0:
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(got).all()


def test_empty_prompt(llama):
    dense, ours = llama
    empty = torch.empty(1, 0, dtype=torch.long)

    def outcome(model, cache):
        try:
            return forward(model, empty, cache).shape
        except Exception as error:
            return type(error)

    cache = small_cache(ours)
    assert outcome(ours, cache) == outcome(dense, DynamicCache(config=dense.config))
    assert cache.get_seq_length() == 0
    # It can be used all the same.
    assert torch.equal(forward(ours, prompt(30), cache), forward(dense, prompt(30)))
