"""Models whose attention the cache cannot represent are refused before anything is touched."""

import pytest
import torch
from decoded_cache import small_cache
from tiny_models import forward, make_model, prompt
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import selfindex
from selfindex import UnsupportedModelError


def test_not_a_model():
    for thing in (torch.nn.Linear(2, 2), "meta-llama/Llama-3.1-8B", None):
        with pytest.raises(UnsupportedModelError, match="expected a transformers model"):
            selfindex.SelfIndexCache(thing)


def tiny_gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=128, n_head=2, vocab_size=96, n_positions=64)).eval()


def test_untested_family_is_refused_but_may_be_tried():
    model = tiny_gpt2()
    with pytest.raises(UnsupportedModelError, match="gpt2: not among the tested"):
        selfindex.SelfIndexCache(model)
    assert model.config._attn_implementation == "sdpa"
    cache = small_cache(model, allow_untested=True)
    wanted = forward(tiny_with(model), prompt(30))
    assert torch.equal(forward(model, prompt(30), cache), wanted)


def tiny_with(model):
    fresh = tiny_gpt2()
    fresh.load_state_dict(model.state_dict())
    return fresh


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
