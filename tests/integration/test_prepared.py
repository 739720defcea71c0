"""A model that was prepared for this cache, used without it: it is the model it was."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from decoded_cache import small_cache
from tiny_models import VOCAB, cache_argument, forward, make_model, pair, prompt
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from selfindex.integrations.transformers.prepare import prepare


@pytest.fixture
def models():
    dense = pair("llama")[0]
    ours = copy.deepcopy(dense)
    small_cache(ours)
    return dense, ours


def test_nothing_but_hooks_and_methods_is_added(models):
    dense, ours = models
    forward(ours, prompt(40), small_cache(ours))
    assert ours.config._attn_implementation == "sdpa"
    methods = {"forward", "prepare_inputs_for_generation", "_replicate_for_data_parallel"}
    assert vars(ours).keys() - vars(dense).keys() == methods
    assert all(inspect.signature(getattr(ours, x)) == inspect.signature(getattr(dense, x)) for x in methods)
    assert ours.config.to_dict() == dense.config.to_dict()


def test_continuous_batching(models):
    _, ours = models
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=VOCAB, pad_token_id=0)
    # Where the attention implementation is judged; a whole batch spends its time on making room.
    ours.init_continuous_batching(generation_config=config)


def test_copies_files_and_configurations(models, tmp_path):
    dense, ours = models
    ours.save_pretrained(tmp_path)
    copies = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ]
    wanted, compressed = forward(dense, prompt(40)), forward(ours, prompt(40), small_cache(ours))
    for other in (*copies, AutoModelForCausalLM.from_config(ours.config)):
        assert other.config._attn_implementation == "sdpa"
    for other in copies:
        assert torch.equal(forward(other, prompt(40)), wanted)
        assert torch.equal(forward(other, prompt(40), small_cache(other)), compressed)


def test_another_attention_implementation_is_taken_up(models):
    _, ours = models
    cache = small_cache(ours, budget=9)
    wanted = [forward(ours, prompt(n), cache) for n in (40, 1)]
    cache.reset()
    ours.set_attn_implementation("eager")
    for n, before in zip((40, 1), wanted, strict=True):
        torch.testing.assert_close(forward(ours, prompt(n), cache), before)
    assert ours.config._attn_implementation == "eager"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_cut_short(models, error):
    dense, ours = models
    cache = small_cache(ours)

    def stop(*_):
        raise error

    hook = ours.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(error):
        forward(ours, prompt(40), cache)
    hook.remove()
    names = []
    ours.model.layers[1].register_forward_pre_hook(lambda *_: names.append(ours.config._attn_implementation))
    # The next pass, of whatever kind, finds what an interrupt left.
    assert torch.equal(forward(ours, prompt(40)), forward(dense, prompt(40)))
    assert [*names, ours.config._attn_implementation] == ["sdpa", "sdpa"]


def test_preparations_are_counted():
    _, model = (copy.deepcopy(x) for x in pair("llama"))
    undo = [prepare(model), prepare(model.model), prepare(model)]
    cache = small_cache(model)  # prepares it for good
    for each in undo:
        each()
        each()
    forward(model, prompt(5), cache)
    model = make_model("olmo2")
    undo = [prepare(model), prepare(model.model)]
    assert "forward" in vars(model)
    assert [len(x._forward_hooks) for x in (model, model.model)] == [1, 1]
    undo[0]()
    assert [len(x._forward_hooks) for x in (model, model.model)] == [0, 1]
    undo[1]()
    assert not {**model.model._forward_hooks, **model.model._forward_pre_hooks}
    assert not {"forward", "prepare_inputs_for_generation"} & vars(model).keys()


def test_passes_with_and_without_it_at_the_same_time(models):
    """A dense pass in a thread of its own, while one with this cache has the name switched."""
    dense, ours = models
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[0, :7] = 0

    def run(model):
        cache = DynamicCache(config=model.config)
        first = forward(model, prompt(40, 2), cache, mask[:, :40])
        return torch.cat((first, forward(model, prompt(1, 2), cache, mask)), 1)

    wanted, found = run(dense), []

    def meanwhile(*_):
        hook.remove()
        assert ours.config._attn_implementation == "selfindex"
        thread = threading.Thread(target=lambda: found.append(run(ours)))
        thread.start()
        thread.join()

    hook = ours.model.layers[0].mlp.register_forward_pre_hook(meanwhile)
    masks = []
    ours.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    cache = small_cache(ours)
    argument = {cache_argument(ours): cache}
    with torch.no_grad():
        ours(prompt(40), **argument)
    assert torch.equal(found[0], wanted)
    # Masks in this cache's own form stay in its passes: such a pass may end with the name switched back.
    assert [None if x is None else x.ndim for x in masks] == [4, 4, None]
    assert ours.config._attn_implementation == "sdpa"
