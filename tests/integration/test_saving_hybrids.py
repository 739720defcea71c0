"""Saved caches of models whose other layers hold a window or a state."""

import families
import pytest
import torch
from decoded_cache import small_cache
from saved_files import forge
from tiny_models import HYBRIDS, forward, prompt
from transformers.cache_utils import DynamicSlidingWindowLayer

from selfindex import FormatError, SelfIndexCache, StateError
from selfindex.integrations.transformers import bounded

FAMILIES = (*HYBRIDS, *filter(families.available, (*families.WINDOWS, *families.STATES)))
FEW = ("gemma3", "llama4_text", "lfm2", "qwen3_5_text", "falcon_h1")
"""Windows, chunks, convolutions, recurrent states, and such states in the compressed layers' blocks."""


def model(family):
    return families.any_pair(family)[1]


def reloaded(cache, ours, folder, **options):
    cache.save(ours, folder / "prefix")
    return SelfIndexCache.load(ours, folder / "prefix", **options)


def check_same(ours, cache, loaded, batch, *numbers, mask=None):
    for new in numbers:
        ids = prompt(new, batch, seed=new)
        mask = None if mask is None else torch.cat((mask, mask.new_ones(batch, new)), 1)
        assert torch.equal(forward(ours, ids, loaded, mask), forward(ours, ids, cache, mask))
    assert loaded.get_seq_length() == cache.get_seq_length()
    return mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [61, 7])
def test_a_loaded_prefix_goes_on_like_the_original(family, tokens, tmp_path):
    ours = model(family)
    cache = small_cache(ours, budget=9)
    forward(ours, prompt(tokens, 2), cache)
    forward(ours, prompt(1, 2), cache)
    loaded = reloaded(cache, ours, tmp_path)
    assert [type(x) for x in loaded.layers] == [type(x) for x in cache.layers]
    check_same(ours, cache, loaded, 2, 1, 3, 20, 1)


@pytest.mark.parametrize("family", FEW)
def test_padding_and_rows(family, tmp_path):
    ours, mask = model(family), torch.ones(2, 40, dtype=torch.long)
    mask[1, :15] = 0
    cache = small_cache(ours, budget=9)
    forward(ours, prompt(40, 2), cache, mask)
    loaded = reloaded(cache, ours, tmp_path)
    for one in (cache, loaded):
        one.reorder_cache(torch.tensor([1, 1, 0]))
    mask = check_same(ours, cache, loaded, 3, 1, 2, mask=mask[[1, 1, 0]])
    one, other = (x.fork() for x in (cache, loaded))
    check_same(ours, one, other, 3, 5, mask=mask)


@pytest.mark.parametrize("family", FEW)
def test_a_cache_loaded_in_inference_mode_goes_on_outside_of_it(family, tmp_path):
    ours = model(family)
    cache = small_cache(ours, budget=9)
    forward(ours, prompt(40), cache)
    with torch.inference_mode():
        loaded = reloaded(cache, ours, tmp_path)
    check_same(ours, cache, loaded, 1, 1, 3)
    loaded.reset()
    forward(ours, prompt(20), loaded)


def test_a_window_restored_in_inference_mode_may_be_written():
    layer = DynamicSlidingWindowLayer(16)
    with torch.inference_mode():
        held = {name: torch.ones(2, 1, 15, 8) for name in ("keys", "values")}
        bounded.restore(layer, held, {}, 2, 40)
    layer.keys.zero_(), layer.values.zero_()  # as `reset` of transformers 5.17 does
    assert layer.get_seq_length() == 40


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_a_window_that_is_a_ring_is_saved(family, tmp_path):
    ours = model(family)
    cache = small_cache(ours, budget=9)
    forward(ours, prompt(40), cache)
    cache.replay.emulate = True
    for token in prompt(30, seed=2).split(1, 1):
        forward(ours, token, cache)
    assert cache.replay.steps == 30
    loaded = reloaded(cache, ours, tmp_path)
    loaded.replay.emulate = True
    check_same(ours, cache, loaded, 1, 1, 3, 1)
    assert loaded.replay.steps == 3


@pytest.mark.parametrize("family", ["gemma3", "lfm2"])
@pytest.mark.parametrize("tokens", [40, 2])
def test_a_recorded_past_is_left_out(family, tokens, tmp_path):
    ours = model(family)
    cache = small_cache(ours, recent=100)
    cache.activate_past_recording()
    forward(ours, prompt(tokens), cache)
    loaded = reloaded(cache, ours, tmp_path)
    for layer in loaded.layers:
        for x in (getattr(layer, "keys", None), *getattr(layer, "conv_states", {}).values()):
            assert not isinstance(x, torch.Tensor) or x.shape[2] < 16
    cache.crop(0)
    check_same(ours, cache, loaded, 1, 3)


def test_an_interrupted_window_is_not_saved(tmp_path):
    ours = model("gemma3")
    cache = small_cache(ours)
    forward(ours, prompt(40), cache)
    [window] = cache._windows()
    window.update(*torch.zeros(2, 1, *window.keys.shape[1:2], 1, window.keys.shape[3]))
    with pytest.raises(StateError, match="interrupted"):
        cache.save(ours, tmp_path / "prefix")
    assert not list(tmp_path.iterdir())


def forget_a_window(header, tensors):
    number = header["others"].pop(0)["layer"]
    for name in [n for n in tensors if n.startswith(f"others.{number}.")]:
        del tensors[name]


def change(name, how):
    def changed(header, tensors):
        first = next(n for n in tensors if n.startswith("others.") and n.endswith(name))
        found = how(tensors.pop(first))
        if found is not None:
            tensors[first] = found.contiguous()

    return changed


@pytest.mark.parametrize(
    ("family", "damage", "message"),
    [
        ("gemma3", forget_a_window, "holds windows or states of layers"),
        ("gemma3", lambda h, t: h.update(others=[1]), "layers cannot be what it is"),
        ("gemma3", lambda h, t: h.pop("others"), "header of .* damaged"),
        ("gemma3", lambda h, t: h["others"][0].update(layer=True), "holds windows or states of layers"),
        ("gemma3", change("keys", lambda x: None), "keys and values of shapes"),
        ("gemma3", change("keys", lambda x: x[:, :, 1:]), "keys and values of shapes"),
        ("gemma3", change("values", lambda x: x[:, :1, :, :7]), "keys and values of shapes"),
        ("gemma3", change("keys", lambda x: x.long()), "not of 2 rows"),
        ("gemma3", lambda h, t: t.update({"others.0.more": torch.ones(2, 1)}), "does not hold"),
        ("lfm2", change("conv_state_0", lambda x: x[:1]), "not of 2 rows"),
        ("lfm2", lambda h, t: h["others"][0].pop("has_state"), "are said to have begun: None"),
        ("lfm2", lambda h, t: h["others"][0].update(has_state=[1]), "are said to have begun"),
        ("lfm2", lambda h, t: t.update({"others.0.conv_state_1": torch.ones(2, 1)}), "does not hold"),
    ],
)
def test_a_forged_file_is_refused(family, damage, message, tmp_path):
    ours = model(family)
    cache = small_cache(ours)
    forward(ours, prompt(40, 2), cache)
    cache.save(ours, tmp_path / "prefix")
    forge(tmp_path / "prefix", damage)
    with pytest.raises(FormatError, match=message):
        SelfIndexCache.load(ours, tmp_path / "prefix")
