"""Models inside PEFT's, torch.compile's and data-parallel wrappers."""

import copy

import peft
import pytest
import torch
from stores import SMALL
from tiny_models import generate, pair, prompt

import selfindex
from selfindex import SelfIndexCache, UnsupportedModelError
from selfindex.integrations.transformers.models import cache_argument
from selfindex.integrations.transformers.wrappers import unwrap


@pytest.fixture
def model():
    return copy.deepcopy(pair("llama")[0])


def lora(model):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


WRAPPERS = {
    "peft": lora,
    "tuner": lambda model: lora(model).base_model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": torch.nn.DataParallel,
    "several": lambda model: torch.compile(torch.nn.DataParallel(lora(model)), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_unwrapped_everywhere(model, name, tmp_path):
    wrapped = WRAPPERS[name](model)
    inner = unwrap(wrapped)
    assert inner is model
    cache = SelfIndexCache(wrapped, **SMALL, budget=9)
    wanted = generate(inner, prompt(60), cache)
    with selfindex.enable(wrapped, **SMALL, budget=9) as enabled:
        assert torch.equal(generate(inner, prompt(60)), wanted)
        assert enabled.cache.compressed_layers[0].read == [9]
    cache.save(wrapped, tmp_path / "prefix")
    assert SelfIndexCache.load(wrapped, tmp_path / "prefix").get_seq_length() == cache.get_seq_length()


def test_an_adapter_generates_and_runs_forward_inside_enable(model):
    wrapped = lora(model)
    wanted = generate(model, prompt(60), SelfIndexCache(model, **SMALL, budget=9))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 96, "pad_token_id": 0}
    ids = prompt(60)
    with selfindex.enable(wrapped, **SMALL, budget=9) as enabled, torch.no_grad():
        got = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(got, wanted)
        # PEFT calls the model's forward method, not the model.
        wrapped(input_ids=prompt(40))
        assert enabled.cache.get_seq_length() == 40
        wrapped(input_ids=prompt(1), **{cache_argument(wrapped): enabled.cache})
        assert enabled.cache.get_seq_length() == 41


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
    ],
)
def test_adapters_that_add_tokens_are_refused(model, config):
    with pytest.raises(UnsupportedModelError, match="before the prompt"):
        SelfIndexCache(peft.get_peft_model(model, config))


def test_what_is_no_model_is_refused_by_its_own_name():
    with pytest.raises(UnsupportedModelError, match="got DataParallel"):
        SelfIndexCache(torch.nn.DataParallel(torch.nn.Linear(2, 2)))
