"""A saved prefix goes on as if it had never left, and a wrong file is refused."""

import pytest
import torch
from decoded_cache import small_cache
from safetensors.torch import load_file
from saved_files import as_version_2, forge
from tiny_models import forward, make_model, pair, prompt

from selfindex import FormatError, SelfIndexCache, StateError


def filled(model, tokens=61, batch=1, **options):
    cache = small_cache(model, budget=9, **options)
    forward(model, prompt(tokens, batch=batch), cache)
    return cache


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"pinned_tokens": 5}], ids=str)
@pytest.mark.parametrize("tokens", [61, 7])
def test_a_loaded_prefix_goes_on_like_the_original(family, options, tokens, tmp_path):
    _, ours = pair(family)
    cache = filled(ours, tokens, batch=2, **options)
    cache.save(ours, tmp_path / "prefix")
    loaded = SelfIndexCache.load(ours, tmp_path / "prefix")
    assert loaded.config == cache.config
    for new in (1, 3, 20, 1):
        ids = prompt(new, batch=2, seed=new)
        assert torch.equal(forward(ours, ids, loaded), forward(ours, ids, cache))
    assert loaded.get_seq_length() == cache.get_seq_length() == tokens + 25
    # What is stored is the same; growing one step at a time may have left other slack.
    one, other = (x.report().memory for x in (loaded, cache))
    assert (one.index, one.payload, one.full_precision) == (other.index, other.payload, other.full_precision)


@pytest.mark.parametrize("preset", ["balanced", "paper"])
@pytest.mark.parametrize("tokens", [61, 7])
def test_a_file_of_version_2_is_read(preset, tokens, tmp_path):
    """Its rows had one balance; that of one row is what they all had then."""
    _, ours = pair("llama")
    cache = filled(ours, tokens, preset=preset)
    cache.batch_repeat_interleave(2)
    cache.save(ours, tmp_path / "prefix")
    as_version_2(tmp_path / "prefix")
    loaded = SelfIndexCache.load(ours, tmp_path / "prefix")
    statistics = loaded.compressed_layers[0].store.statistics
    assert statistics.shared == (preset == "balanced" and tokens == 61)
    for new in (1, 3, 20, 1):
        ids = prompt(new, batch=2, seed=new)
        got, wanted = (forward(ours, ids, x) for x in (loaded, cache))
        # With nothing encoded yet, what it measures comes from all queries of then.
        close = {"atol": 1e-4, "rtol": 1e-4} if tokens == 61 or preset == "paper" else {"atol": 1, "rtol": 1}
        torch.testing.assert_close(got, wanted, **close)
    loaded.save(ours, tmp_path / "again")
    again = SelfIndexCache.load(ours, tmp_path / "again")
    ids = prompt(1, batch=2)
    assert torch.equal(forward(ours, ids, again), forward(ours, ids, loaded))


def test_a_file_of_version_3_is_read(tmp_path):
    _, ours = pair("llama")
    cache = filled(ours, batch=2)
    cache.save(ours, tmp_path / "prefix")
    forge(tmp_path / "prefix", lambda header, tensors: header.pop("others"), "3")
    loaded = SelfIndexCache.load(ours, tmp_path / "prefix")
    assert torch.equal(forward(ours, prompt(1, 2), loaded), forward(ours, prompt(1, 2), cache))


def test_padding_is_remembered(tmp_path):
    _, ours = pair("llama")
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :15] = 0
    cache = small_cache(ours, budget=9)
    forward(ours, prompt(40, batch=2), cache, mask)
    cache.save(ours, tmp_path / "prefix")
    loaded = SelfIndexCache.load(ours, tmp_path / "prefix")
    for c in (cache, loaded):
        c.crop(-3)
    # What was cropped can be saved again.
    loaded.save(ours, tmp_path / "again")
    loaded = SelfIndexCache.load(ours, tmp_path / "again")
    longer = torch.cat((mask[:, :-3], mask.new_ones(2, 1)), 1)
    got, wanted = (forward(ours, prompt(1, batch=2), c, longer) for c in (loaded, cache))
    assert torch.equal(got, wanted)


def test_many_requests_share_a_loaded_prefix(tmp_path):
    _, ours = pair("llama")
    filled(ours).save(ours, tmp_path / "prefix")
    shared = SelfIndexCache.load(ours, tmp_path / "prefix")
    pages = shared.compressed_layers[0].store.pool.used
    shared.batch_repeat_interleave(5)
    assert shared.compressed_layers[0].store.pool.used == pages
    ids = prompt(4, batch=5)
    together = forward(ours, ids, shared)
    for b in range(5):
        alone = SelfIndexCache.load(ours, tmp_path / "prefix")
        torch.testing.assert_close(forward(ours, ids[b : b + 1], alone)[0], together[b], atol=1e-4, rtol=1e-4)


def test_shared_pages_are_written_once(tmp_path):
    _, ours = pair("llama")
    cache = filled(ours)
    cache.batch_repeat_interleave(3)
    cache.save(ours, tmp_path / "prefix")
    assert load_file(tmp_path / "prefix")["layers.0.index"].shape[0] == 6
    loaded = SelfIndexCache.load(ours, tmp_path / "prefix")
    assert loaded.compressed_layers[0].store.pool.used == 6
    loaded.crop(-50)
    assert loaded.compressed_layers[0].store.pool.used == 1


def test_another_dtype_is_refused(tmp_path):
    model = make_model("llama")
    filled(model).save(model, tmp_path / "prefix")
    with pytest.raises(FormatError, match=r"a model in torch\.float32, this one is in torch\.bfloat16"):
        SelfIndexCache.load(model.bfloat16(), tmp_path / "prefix")


def test_a_file_of_another_model_is_refused(tmp_path):
    filled(pair("llama")[1]).save(pair("llama")[1], tmp_path / "prefix")
    with pytest.raises(FormatError, match="another model"):
        SelfIndexCache.load(make_model("llama", num_hidden_layers=1), tmp_path / "prefix")
    with pytest.raises(FormatError, match="another model"):
        SelfIndexCache.load(
            make_model("llama", seed=0, initializer_range=0.05, head_dim=96), tmp_path / "prefix"
        )


def test_what_cannot_be_saved(tmp_path):
    _, ours = pair("llama")
    with pytest.raises(StateError, match="empty"):
        small_cache(ours).save(ours, tmp_path / "prefix")
    stopped = filled(ours)
    stopped.compressed_layers[0].positions += 1
    with pytest.raises(StateError, match="interrupted"):
        stopped.save(ours, tmp_path / "prefix")
    with pytest.raises(StateError, match="another model"):
        filled(ours).save(pair("qwen3")[1], tmp_path / "prefix")
