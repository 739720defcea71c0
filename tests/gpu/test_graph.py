"""Forward passes of a few tokens replay a graph on a GPU, and agree with passes run by Python."""

import gc
import warnings

import pytest
import torch
from tiny_models import VOCAB, cache_argument, forward, generate, make_model, prompt

import selfindex
from selfindex.integrations.transformers import graphs, replay

pytestmark = pytest.mark.gpu


def model_on_gpu(family="llama", dtype=torch.bfloat16):
    return make_model(family, dtype=dtype, max_position_embeddings=8192).cuda()


# How a row is spread over the GPU depends on the width of the block table, and the last bits of the
# softmax with it: of nearly equal tokens at the edge of the budget, others may be selected, and a key between
# two levels may get the other one when its page is encoded.
@pytest.mark.parametrize(
    ("dtype", "budget", "tolerance"),
    [(torch.float32, 1.0, 2e-2), (torch.float32, 200, 0.05), (torch.bfloat16, 200, 0.15)],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("length", [1500, 20])
def test_replayed_steps_agree_with_single_steps(family, length, dtype, budget, tolerance):
    model, ids = model_on_gpu(family, dtype), prompt(length, batch=2).cuda()
    caches = []
    for cuda_graphs in (False, True):
        caches.append(
            selfindex.SelfIndexCache(
                model, budget=budget, dense_below=0, min_tokens=1, cuda_graphs=cuda_graphs
            )
        )
        forward(model, ids, caches[-1])
    single, replayed = caches
    for i, tokens in enumerate(prompt(300, batch=2, seed=1).cuda().split(1, 1)):
        wanted, got = (forward(model, tokens, cache).float() for cache in caches)
        # Pages are encoded on the way.
        error = (got - wanted).norm() / wanted.norm()
        assert error < tolerance, (i, float(error))
    assert (single.replay.steps, replayed.replay.steps) == (0, 300)
    a, b = (cache.compressed_layers[-1].store for cache in caches)
    assert a.window.lengths == b.window.lengths
    assert a.table.rows == b.table.rows
    assert replayed.get_seq_length() == single.get_seq_length() == length + 300


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4},
        {"eos_token_id": list(range(2, 12))},
    ],
)
@pytest.mark.parametrize("kept", [{}, {"preset": "paper"}, {"pinned_tokens": 100}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_gives_the_tokens_of_eager_steps(options, kept, padded):
    model, ids = (
        model_on_gpu(dtype=torch.float32),
        prompt(400, batch=1 if "prompt_lookup_num_tokens" in options else 2),
    )
    mask = torch.ones_like(ids)
    if padded and len(ids) > 1:
        mask[0, :37] = 0
    found = []
    for cuda_graphs in (False, True):
        cache = selfindex.SelfIndexCache(model, budget=1.0, cuda_graphs=cuda_graphs, **kept)
        torch.manual_seed(1)
        found.append(
            generate(model, ids.cuda(), cache, attention_mask=mask.cuda(), max_new_tokens=60, **options)
        )
    assert torch.equal(*found)
    assert cache.replay.steps > 5


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3_moe", "phi3", "smollm3", "olmo2"])
def test_families(family):
    model, ids = model_on_gpu(family, torch.float32), prompt(300, batch=2).cuda()
    wanted = generate(model, ids, selfindex.SelfIndexCache(model, budget=1.0, cuda_graphs=False))
    cache = selfindex.SelfIndexCache(model, budget=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate(model, ids, cache), wanted)
    assert cache.replay.steps == 11


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "olmo3"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("length", [7, 300])
def test_models_with_sliding_windows(family, options, length):
    model, ids = model_on_gpu(family, torch.float32), prompt(length, batch=2).cuda()
    options = {"max_new_tokens": 60} | options
    wanted = generate(model, ids, selfindex.SelfIndexCache(model, budget=1.0, cuda_graphs=False), **options)
    cache = selfindex.SelfIndexCache(model, budget=1.0)
    # Beam search of transformers 5.17 runs experts in a way that waits for the GPU, which is said.
    recorded = family != "gpt_oss" or "num_beams" not in options
    with warnings.catch_warnings():
        warnings.simplefilter("error" if recorded else "ignore")
        assert torch.equal(generate(model, ids, cache, **options), wanted)
    assert cache.replay.steps == 59 or not recorded


def test_windows_follow_what_happens_between_replayed_steps():
    model = model_on_gpu("gemma3", torch.float32)
    caches = [selfindex.SelfIndexCache(model, budget=1.0, cuda_graphs=graphs) for graphs in (False, True)]
    for new in (300, 1, 8, 20, 1, 3, 8, 8, 1):
        wanted, got = (forward(model, prompt(new, 2, seed=new).cuda(), cache) for cache in caches)
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=2e-3)
        for cache in caches:
            cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
    caches[0].batch_repeat_interleave(2)
    caches[1].batch_repeat_interleave(2)
    for token in prompt(40, 4, seed=3).cuda().split(1, 1):
        wanted, got = (forward(model, token, cache) for cache in caches)
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=2e-3)
    assert caches[1].replay.steps == 47


def test_steps_between_other_passes():
    model, ids = model_on_gpu(dtype=torch.float32), prompt(700, batch=2).cuda()
    caches = [selfindex.SelfIndexCache(model, budget=1.0, cuda_graphs=graphs) for graphs in (False, True)]
    for cache in caches:
        forward(model, ids, cache)

    def both(what):
        wanted, got = map(what, caches)
        if wanted is not None:
            torch.testing.assert_close(got, wanted, atol=2e-3, rtol=2e-3)

    for new in (1, 1, 5, 30, 1, 200, 3, 1):
        both(lambda cache, new=new: forward(model, prompt(new, 2, seed=new).cuda(), cache))
        both(lambda cache: cache.crop(-1))
        both(lambda cache: cache.reorder_cache(torch.tensor([1, 0], device="cuda")))
    caches = [cache.fork() for cache in caches]
    both(lambda cache: forward(model, prompt(1, 2).cuda(), cache))
    both(lambda cache: cache.batch_repeat_interleave(2))
    both(lambda cache: forward(model, prompt(1, 4).cuda(), cache))
    both(lambda cache: cache.set_budget(50))
    both(lambda cache: cache.reset())
    both(lambda cache: forward(model, ids, cache))
    both(lambda cache: forward(model, prompt(1, 2).cuda(), cache))
    assert caches[1].replay.steps == 3


def test_compiled_steps():
    model, ids = model_on_gpu(dtype=torch.float32), prompt(700, batch=2).cuda()
    wanted = generate(model, ids, selfindex.SelfIndexCache(model, budget=1.0), max_new_tokens=150)
    cache = selfindex.SelfIndexCache(model, budget=1.0, compile=True)
    assert torch.equal(generate(model, ids, cache, max_new_tokens=150), wanted)
    assert cache.replay.steps == 149


def test_a_model_that_cannot_be_recorded_says_so_and_runs():
    model, ids = model_on_gpu(dtype=torch.float32), prompt(300).cuda()
    wanted = generate(model, ids, selfindex.SelfIndexCache(model, budget=1.0, cuda_graphs=False))
    layer = model.model.layers[0].mlp
    run = layer.forward
    layer.forward = lambda x: run(x) if bool((x == x).all()) else x  # waits for the GPU
    cache = selfindex.SelfIndexCache(model, budget=1.0)
    with pytest.warns(RuntimeWarning, match="recording a step of LlamaForCausalLM failed"):
        assert torch.equal(generate(model, ids, cache), wanted)
    assert cache.replay.steps == 0
    del layer.forward
    cache = selfindex.SelfIndexCache(model, budget=1.0)
    assert torch.equal(generate(model, ids, cache), wanted)
    assert cache.replay.steps == 11


def test_hooks_adapters_and_new_weights_are_noticed():
    model, ids = model_on_gpu(dtype=torch.float32), prompt(300).cuda()
    cache, step = selfindex.SelfIndexCache(model, budget=1.0), prompt(1).cuda()
    forward(model, ids, cache)
    forward(model, step, cache)
    assert cache.replay.steps == 1
    called = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: called.append(1))
    forward(model, step, cache)
    assert called
    handle.remove()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 0)
    assert not forward(model, step, cache).any()


def test_memory_does_not_grow_over_many_steps():
    model, ids = model_on_gpu(), prompt(400).cuda()
    cache = selfindex.SelfIndexCache(model, budget=64, dense_below=0)
    forward(model, ids, cache)
    argument, token, seen = cache_argument(model), ids[:, :1], []
    with torch.no_grad():
        for i in range(20_000):
            logits = model(input_ids=token, **{argument: cache}).logits
            if i in (1000, 19_990):
                cache.crop(1500 - cache.get_seq_length()) if i > 1000 else None
                gc.collect()
                torch.cuda.synchronize()
                seen.append(torch.cuda.memory_allocated())
    assert torch.isfinite(logits).all()
    # Pages of 19,000 tokens, and what their pool and tables have to spare.
    pages = cache.compressed_layers[0].store.pool.capacity * sum(
        layer.store.format.index_bytes + layer.store.format.payload_bytes for layer in cache.compressed_layers
    )
    assert seen[1] <= seen[0] + 2 * pages + (1 << 20)


def test_a_graph_among_the_garbage_does_not_end_a_capture(monkeypatch):
    model, ids = model_on_gpu(), prompt(400).cuda()
    wanted = selfindex.generate(model, ids, max_new_tokens=4, eos_token_id=VOCAB, pad_token_id=0)
    cache = selfindex.SelfIndexCache(model)
    forward(model, ids, cache)
    forward(model, ids[:, -1:], cache)
    [recording] = cache.replay._recordings.values()
    garbage, recording.graph = [recording.graph], None
    run = graphs.Recorder.record

    def littering(self, step):
        def littered():
            if garbage and torch.cuda.is_current_stream_capturing():
                cycle = [garbage.pop()]
                cycle.append(cycle)
                del cycle
                _ = [[] for _ in range(10_000)]  # enough for the collector to look
            step()

        return run(self, littered)

    monkeypatch.setattr(graphs.Recorder, "record", littering)
    got = selfindex.generate(model, ids, max_new_tokens=4, eos_token_id=VOCAB, pad_token_id=0)
    assert torch.equal(got, wanted)
    assert not garbage


def test_memory_does_not_grow_from_cache_to_cache():
    model, ids = model_on_gpu(), prompt(400).cuda()
    seen = []
    for _ in range(6):
        selfindex.generate(model, ids, max_new_tokens=4, eos_token_id=VOCAB, pad_token_id=0)
        gc.collect()
        torch.cuda.synchronize()
        seen.append(torch.cuda.memory_allocated())
    assert seen[-1] <= seen[1] + (1 << 20)


def test_caches_side_by_side_have_streams_of_their_own():
    model, ids = model_on_gpu(), prompt(400).cuda()
    caches = []
    for _ in range(3):
        caches.append(selfindex.SelfIndexCache(model))
        forward(model, ids, caches[-1])
        forward(model, ids[:, -1:], caches[-1])
    streams = [cache.replay._recorder._stream for cache in caches]
    assert len(set(map(id, streams))) == 3
    del caches
    gc.collect()
    again = selfindex.SelfIndexCache(model)
    forward(model, ids, again)
    forward(model, ids[:, -1:], again)
    assert any(again.replay._recorder._stream is stream for stream in streams)


def test_the_report_says_what_a_replayed_step_missed():
    """Queries lie where graphs of several lengths, which share memory, have put them."""
    model = model_on_gpu()
    caches = [
        selfindex.SelfIndexCache(model, budget=150, dense_below=0, cuda_graphs=graphs)
        for graphs in (False, True)
    ]
    for cache in caches:
        forward(model, prompt(2500, batch=2).cuda(), cache)
    for i, new in enumerate([1, 3, 1, 1, 8, 3, 1] * 5):
        for cache in caches:
            forward(model, prompt(new, batch=2, seed=i).cuda(), cache)
        single, replayed = (cache.report() for cache in caches)
        for one, other in zip(single.layers, replayed.layers, strict=True):
            assert 0.01 < one.missed < 0.99
            assert other.row_missed == pytest.approx(one.row_missed, rel=0.05, abs=0.01)
    assert (caches[0].replay.steps, caches[1].replay.steps) == (0, 35)


@pytest.mark.parametrize("new", [1, 3])
def test_rows_that_fix_their_balance_one_by_one(new, monkeypatch):
    """What replayed steps measure is what others measure, and they are recorded twice: before and after."""
    model, made, record = model_on_gpu(dtype=torch.float32), [], replay.Replay._record
    monkeypatch.setattr(replay.Replay, "_record", lambda *args: made.append(1) or record(*args))
    ids, start = prompt(400, batch=3).cuda(), torch.ones(3, 400, dtype=torch.long, device="cuda")
    start[1, :260], start[2, :390] = 0, 0
    caches = []
    for cuda_graphs in (False, True):
        cache, mask = selfindex.SelfIndexCache(model, budget=1.0, cuda_graphs=cuda_graphs), start
        forward(model, ids, cache, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        for layer in cache.compressed_layers:
            layer.store.reserve(100, 0)  # no pool moves
        made.clear()
        for i in range(330 // new):
            mask = torch.cat((mask, mask.new_ones(3, new)), 1)
            tokens, positions = prompt(new, 3, seed=i).cuda(), (mask.cumsum(1) - 1)[:, -new:]
            forward(model, tokens, cache, mask, position_ids=positions)
        caches.append(cache)
    assert len(made) <= 2
    assert caches[1].replay.steps == 330 // new
    for one, other in zip(*(cache.compressed_layers for cache in caches), strict=True):
        assert one.store.statistics.has_constants == other.store.statistics.has_constants == (True,) * 3
        assert one.store.statistics.queries_seen == other.store.statistics.queries_seen
        torch.testing.assert_close(one.store.constants, other.store.constants, atol=2e-2, rtol=2e-2)
        assert not torch.equal(one.store.constants[0], one.store.constants[2])
