"""Models whose attention the cache cannot represent are refused before anything is touched."""

import re

import pytest
import torch
from decoded_cache import decoded_cache, full_cache, small_cache
from families import BASE
from refused_families import REFUSED, refused_model
from tiny_models import forward, make_model, pair, prompt
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import selfindex
from selfindex import InputError, UnsupportedModelError


def test_not_a_model():
    for thing in (torch.nn.Linear(2, 2), "meta-llama/Llama-3.1-8B", None):
        with pytest.raises(UnsupportedModelError, match="expected a transformers model"):
            selfindex.SelfIndexCache(thing)


def tiny_ctrl():
    torch.manual_seed(0)
    config = CTRLConfig(n_layer=2, n_embd=128, n_head=2, dff=64, vocab_size=96, n_positions=64)
    return CTRLLMHeadModel(config).eval()


def test_untested_family_is_refused_but_may_be_tried():
    model = tiny_ctrl()
    with pytest.raises(UnsupportedModelError, match="ctrl: not among the tested"):
        selfindex.SelfIndexCache(model)
    assert model.config._attn_implementation == "sdpa"
    cache = small_cache(model, allow_untested=True)
    assert torch.equal(forward(model, prompt(30), cache), forward(tiny_ctrl(), prompt(30)))


@pytest.mark.parametrize("family", sorted(REFUSED))
@pytest.mark.parametrize("untested", [False, True])
def test_what_cannot_work_is_refused_by_name_when_the_cache_is_made(family, untested):
    if family not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have the family")
    model = refused_model(family)
    before = model.config._attn_implementation
    for make in (selfindex.SelfIndexCache, selfindex.enable):
        with pytest.raises(UnsupportedModelError, match=f"^{family}: .*{re.escape(REFUSED[family][1])}"):
            make(model, allow_untested=untested)
    assert model.config._attn_implementation == before


def test_a_text_model_that_attends_to_a_prefix_in_both_directions_is_refused():
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = PaliGemmaConfig(text_config=BASE | {"model_type": "gemma"}, vision_config=vision)
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(config)
    for options in ({}, {"allow_untested": True}):
        with pytest.raises(UnsupportedModelError, match="paligemma: "):
            selfindex.SelfIndexCache(model, **options)


def test_a_window_that_holds_all_positions_is_full_attention():
    dense, ours = pair("phi3", sliding_window=512)
    cache = full_cache(ours)
    assert len(cache.compressed_layers) == 2
    forward(ours, prompt(40), cache)
    for new in (1, 3):
        wanted = forward(dense, prompt(new), decoded_cache(cache, dense))
        torch.testing.assert_close(forward(ours, prompt(new), cache), wanted, atol=2e-4, rtol=2e-4)


def test_tokens_beyond_such_a_window_are_refused():
    _, ours = pair("phi3", sliding_window=40, max_position_embeddings=40)
    cache = small_cache(ours)
    forward(ours, prompt(40), cache)
    with pytest.raises(InputError, match="sliding_window=40"):
        forward(ours, prompt(1), cache)


def test_encoder_decoder_and_latent_attention_are_refused():
    config = T5Config(num_layers=1, d_model=16, d_ff=16, num_heads=1, d_kv=16, vocab_size=8)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        selfindex.SelfIndexCache(T5ForConditionalGeneration(config))
    model = make_model("llama")
    model.config.kv_lora_rank = 8
    with pytest.raises(UnsupportedModelError, match="latent attention"):
        selfindex.SelfIndexCache(model)


def test_soft_capping_is_refused():
    model = make_model("gemma3")
    model.config.attn_logit_softcapping = 50.0
    with pytest.raises(UnsupportedModelError, match="soft-capping"):
        selfindex.SelfIndexCache(model)


def test_a_model_with_sliding_windows_only_is_refused():
    model = make_model("mistral", sliding_window=16)
    with pytest.raises(UnsupportedModelError, match="no layer with full attention"):
        selfindex.SelfIndexCache(model)


def test_other_attention_implementations_are_refused():
    model = make_model("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        selfindex.SelfIndexCache(model)
