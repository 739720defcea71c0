"""torch.compile around a model that uses the cache, and layers on several devices."""

import pytest
import torch
from decoded_cache import small_cache
from tiny_models import cache_argument, generate, make_model, pair, prompt

from selfindex import SelfIndexCache


@pytest.mark.slow
def test_a_compiled_model_equals_the_eager_one():
    _, ours = pair("llama")
    eager, cache = (small_cache(ours, budget=9) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(ours, backend="eager")
    # A prompt, steps on both sides of a page, a chunk: none of them may be compiled for itself.
    for i, new in enumerate((60, *[1] * 10, 5, 1)):
        ids = prompt(new, seed=i)
        with torch.no_grad():
            wanted = ours(ids, **{cache_argument(ours): eager}).logits
            got = compiled(ids, **{cache_argument(ours): cache}).logits
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        if i == 2:
            frames = torch._dynamo.utils.counters["frames"]["ok"]
    assert frames > 0
    # Single steps share what was compiled; the chunk may add to it once.
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 2 * frames
    assert cache.compressed_layers[0].store.encoded(0) == eager.compressed_layers[0].store.encoded(0) > 48
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
