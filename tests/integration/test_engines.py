"""torch.compile around a model that uses the cache, and layers on several devices."""

import copy

import pytest
import torch
from decoded_cache import small_cache
from tiny_models import cache_argument, generate, make_model, pair, prompt
from torch._dynamo import lookup_backend

from selfindex import SelfIndexCache, StateError


@pytest.mark.slow
@pytest.mark.parametrize(("family", "backend"), [("llama", "aot_eager"), ("gemma3", "eager")])
def test_a_compiled_model_equals_the_eager_one(family, backend):
    """One graph for prompts, one for steps, one for chunks, whatever the cache and however full it is."""
    _, ours = pair(family)
    argument, graphs = cache_argument(ours), 0

    def counted(graph, inputs):
        nonlocal graphs
        graphs += 1
        return lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=counted, fullgraph=True)
    for turn in range(2):
        eager, cache = (small_cache(ours, budget=9) for _ in range(2))
        for i, new in enumerate((60, *[1] * 10, 5, 1)):
            ids = prompt(new, 2, seed=i)
            with torch.no_grad():
                wanted = ours(ids, **{argument: eager}).logits
                got = compiled(ids, **{argument: cache}).logits
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        store, reference = (x.compressed_layers[0].store for x in (cache, eager))
        assert store.encoded(0) == reference.encoded(0) > 48
        if turn == 0:
            first = graphs
    assert graphs == first <= 4
    assert ours.config._attn_implementation in ("sdpa", "eager")
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_with_padding():
    _, ours = pair("llama")
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    eager, cache = (small_cache(ours, budget=9) for _ in range(2))
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :9] = 0
    for i, new in enumerate((60, 1, 1, 4)):
        mask, ids = torch.cat((mask, mask.new_ones(2, new if i else 0)), 1), prompt(new, 2, seed=i)
        with torch.no_grad():
            wanted, got = (
                model(ids, attention_mask=mask, **{cache_argument(ours): x}).logits
                for model, x in ((ours, eager), (compiled, cache))
            )
        real = mask[:, -new:].bool()
        torch.testing.assert_close(got[real], wanted[real], atol=1e-4, rtol=1e-4)
    other = copy.deepcopy(ours)
    with pytest.raises(StateError), torch.no_grad():
        torch.compile(other, backend="eager")(prompt(1, 2), **{cache_argument(ours): cache})
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_devices(tmp_path):
    from transformers import AutoModelForCausalLM

    make_model("llama", max_position_embeddings=2048).save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, device_map=places | {"model.norm": 1, "lm_head": 1}
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to("cuda:0")
    ids, options = prompt(700, batch=2).cuda(), {"page_size": 128, "dense_below": 0, "budget": 1.0}
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    cache = small_cache(split, **options)
    got = generate(split, ids, cache, max_new_tokens=150, attention_mask=mask)
    devices = [layer.store.pool.index.device.index for layer in cache.compressed_layers]
    assert devices == [0, 1]
    wanted = generate(whole, ids, small_cache(whole, **options), max_new_tokens=150, attention_mask=mask)
    assert (got == wanted).float().mean() > 0.98
    # Other rows, a crop and a file work where the layers are; graphs are refused.
    fork = cache.fork()
    fork.batch_select_indices(torch.tensor([0]))
    fork.crop(-20)
    fork.save(split, tmp_path / "prefix")
    loaded = SelfIndexCache.load(split, tmp_path / "prefix")
    more = torch.cat((got[:1, : fork.get_seq_length()], prompt(3).cuda()), 1)
    answers = [generate(split, more, x, max_new_tokens=5) for x in (fork, loaded)]
    assert torch.equal(*answers)
    assert loaded.replay.steps == 0
