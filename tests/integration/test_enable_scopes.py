"""`enable` side by side with whatever else changes a model, and what it leaves behind: nothing."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from stores import SMALL
from tiny_models import cache_argument, forward, generate, make_model, pair, prompt
from transformers import DynamicCache, GenerationConfig, LlamaModel

import selfindex


@pytest.fixture
def model():
    return copy.deepcopy(pair("llama")[0])


def traces(model):
    """Everything of a model that `enable` could leave a mark on."""
    hooks = [name for name in vars(model) if "hook" in name]
    found = [{k: id(v) for k, v in vars(x).items() if k not in hooks} for x in model.modules()]
    return found, [[len(vars(x)[h] or ()) for h in hooks] for x in model.modules()], model.config.to_dict()


def in_effect(model, *options):
    """The budgets that `generate` reads with: those of the `enable` in effect."""
    generate(model, prompt(60), max_new_tokens=2)
    return next((x.cache.compressed_layers[0].read for x in options if x.cache is not None), None)


@pytest.mark.parametrize("first_to_end", ["inner", "outer"])
def test_two_at_a_time(model, first_to_end):
    before = traces(model)
    outer = selfindex.enable(model, **SMALL, budget=5)
    inner = selfindex.enable(model, **SMALL, budget=9)
    assert in_effect(model, inner) == [9]
    ending, staying = (inner, outer) if first_to_end == "inner" else (outer, inner)
    ending.disable()
    ending.disable()
    ending.cache = staying.cache = None
    assert in_effect(model, staying) == [staying.config.budget]
    with torch.no_grad():
        model(prompt(40), use_cache=True)
    assert staying.cache.get_seq_length() == 40
    assert ending.cache is None
    staying.disable()
    assert traces(model) == before


def test_an_exception_inside_the_inner_one(model):
    before = traces(model)
    with selfindex.enable(model, **SMALL) as outer:
        with pytest.raises(ZeroDivisionError), selfindex.enable(model, **SMALL, budget=9):
            raise ZeroDivisionError
        assert in_effect(model, outer) is not None
    assert traces(model) == before
    with pytest.raises(selfindex.StateError, match="not prepared"):
        forward(model, prompt(1), outer.cache)


def test_a_refused_model_is_as_it_was(model):
    model.set_attn_implementation("flex_attention")
    before = traces(model)
    with pytest.raises(selfindex.UnsupportedModelError, match="flex_attention"):
        selfindex.enable(model)
    assert traces(model) == before


METHODS = ("generate", "forward", "_prepare_cache_for_generation")


@pytest.mark.parametrize("when", ["before", "inside"])
def test_methods_that_the_caller_replaced_are_kept(model, when):
    calls = []

    def replace():
        for name in METHODS:
            setattr(model, name, recorded(name, getattr(model, name)))
        return {name: vars(model)[name] for name in METHODS}

    def recorded(name, original):
        @functools.wraps(original)
        def own(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        return own

    if when == "before":
        own = replace()
    with selfindex.enable(model, **SMALL, budget=9) as enabled:
        if when == "inside":
            own = replace()
        assert in_effect(model, enabled) == [9]
    assert set(calls) == set(own)
    assert all(vars(model)[name] is function for name, function in own.items())
    last = enabled.cache
    generate(model, prompt(10))
    assert enabled.cache is last


def test_hooks_of_accelerate_come_and_go(model):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    add_hook_to_module(model, ModelHook())
    with selfindex.enable(model, **SMALL, budget=9) as enabled:
        add_hook_to_module(model.model, ModelHook())
        assert in_effect(model, enabled) == [9]
        remove_hook_from_module(model)
        assert in_effect(model, enabled) == [9]
        remove_hook_from_module(model.model)
    assert "_prepare_cache_for_generation" not in vars(model)


def test_arguments_by_position(model):
    with selfindex.enable(model, **SMALL) as enabled, torch.no_grad():
        model(prompt(40), None, None, None)
        assert enabled.cache.get_seq_length() == 40
        held, enabled.cache = enabled.cache, None
        model(prompt(1), None, None, held)
        assert held.get_seq_length() == 41
        model(prompt(5), **{"past_key_values": None})
        assert enabled.cache.get_seq_length() == 5
        enabled.cache = None
        model(prompt(5), None, None, None, None, None, False)
        assert enabled.cache is None


def test_a_model_without_generate():
    torch.manual_seed(0)
    model = LlamaModel(pair("llama")[0].config).eval()
    before = traces(model)
    with selfindex.enable(model, **SMALL) as enabled, torch.no_grad():
        model(prompt(40))
        assert enabled.cache.compressed_layers[0].store.encoded(0) == 24
    assert traces(model) == before


def test_a_model_with_images_and_a_nested_configuration():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    text = make_model("llama").config
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()
    before = traces(model)
    with selfindex.enable(model, **SMALL, budget=9) as enabled, torch.no_grad():
        assert in_effect(model, enabled) == [9]
        model(input_ids=prompt(40))
        assert enabled.cache.get_seq_length() == 40
    assert traces(model) == before


def no_cache_by_argument(model):
    return {"use_cache": False}


def no_cache_by_generation_config(model):
    return {"generation_config": GenerationConfig(use_cache=False)}


def no_cache_by_the_models_generation_config(model):
    model.generation_config.use_cache = False
    return {}


def static_by_argument(model):
    return {"cache_implementation": "static"}


def static_by_generation_config(model):
    return {"generation_config": GenerationConfig(cache_implementation="static")}


@pytest.mark.parametrize(
    ("choose", "reason"),
    [
        (no_cache_by_argument, "use_cache=False"),
        (no_cache_by_generation_config, "use_cache=False"),
        (no_cache_by_the_models_generation_config, "use_cache=False"),
        (static_by_argument, "'static'"),
        (static_by_generation_config, "'static'"),
    ],
)
def test_a_generation_that_is_not_compressed_says_why_once(model, choose, reason):
    wanted = generate(model, prompt(30), max_new_tokens=3)
    with selfindex.enable(model, **SMALL) as enabled:
        options = choose(model) | {"max_new_tokens": 3, "disable_compile": True}
        with pytest.warns(RuntimeWarning, match=f"does not compress here: .*{reason}") as said:
            assert torch.equal(generate(model, prompt(30), **options), wanted)
        assert sum("does not compress" in str(x.message) for x in said) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            generate(model, prompt(30), **options)
        assert enabled.cache is None


def test_a_dynamic_cache_that_was_asked_for_by_name_is_this_one(model):
    model.generation_config.cache_implementation = "dynamic"
    with selfindex.enable(model, **SMALL, budget=9) as enabled:
        assert in_effect(model, enabled) == [9]
    assert model.generation_config.cache_implementation == "dynamic"


def test_a_cache_of_the_callers_says_so_unless_it_is_this_one(model):
    with selfindex.enable(model, **SMALL):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            generate(model, prompt(30), selfindex.SelfIndexCache(model))
        with pytest.warns(RuntimeWarning, match="given a DynamicCache"):
            forward(model, prompt(30), DynamicCache(config=model.config))


def test_models_that_keep_no_cache_get_none(model):
    model.config.use_cache = False
    with selfindex.enable(model, **SMALL) as enabled, torch.no_grad():
        model(prompt(30))
        assert enabled.cache is None


def test_training_runs_as_without_it(model):
    dense = copy.deepcopy(model)
    grads = []
    with selfindex.enable(model, **SMALL, budget=9) as enabled, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert in_effect(model, enabled) == [9]
        for each in (dense, model):
            each.train()
            each(input_ids=prompt(40), labels=prompt(40)).loss.backward()
            grads.append(each.model.layers[0].self_attn.k_proj.weight.grad)
        model.eval()
        assert in_effect(model, enabled) == [9]
    assert torch.equal(*grads)


def test_gradients_that_were_not_meant_run_densely_and_say_so(model):
    with selfindex.enable(model, **SMALL) as enabled:
        with pytest.warns(RuntimeWarning, match="no_grad"):
            got = model(prompt(40)).logits
        assert enabled.cache is None
        assert torch.equal(got, model(prompt(40)).logits)
        with pytest.raises(selfindex.InputError, match="inference"):
            model(prompt(40), **{cache_argument(model): selfindex.SelfIndexCache(model)})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_is_not_enabled(model, copied):
    wanted = generate(model, prompt(60))
    with selfindex.enable(model, **SMALL, budget=3) as enabled:
        other = copied(model)
        assert torch.equal(generate(other, prompt(60)), wanted)
        assert enabled.cache is None
        assert in_effect(model, enabled) == [3]
    assert torch.equal(generate(other, prompt(60)), wanted)
