"""`selfindex.generate` on a GPU replays a graph and agrees with steps run one by one."""

import gc

import pytest
import torch
from tiny_models import VOCAB, forward, generate, make_model, prompt

import selfindex
from selfindex.integrations.transformers.loop import DecodeLoop

pytestmark = pytest.mark.gpu


def model_on_gpu(family="llama", dtype=torch.bfloat16):
    return make_model(family, dtype=dtype, max_position_embeddings=8192).cuda()


# How a row is spread over the GPU depends on the width of the block table, and the last bits of the
# softmax with it: of nearly equal tokens at the edge of the budget, others may be selected.
@pytest.mark.parametrize(
    ("dtype", "budget", "tolerance"),
    [(torch.float32, 1.0, 5e-3), (torch.float32, 200, 0.05), (torch.bfloat16, 200, 0.15)],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_steps_agree_with_single_steps(family, dtype, budget, tolerance):
    model, ids = model_on_gpu(family, dtype), prompt(1500, batch=2).cuda()
    options = {"budget": budget, "dense_below": 0}
    single = selfindex.SelfIndexCache(model, **options)
    forward(model, ids, single)
    fixed = selfindex.SelfIndexCache(model, **options)
    forward(model, ids, fixed)
    loop = DecodeLoop(model, fixed, 300)
    for i, tokens in enumerate(prompt(300, batch=2, seed=1).cuda().unbind(1)):
        got = loop.step(tokens)
        # A page is encoded twice on the way.
        wanted = forward(model, tokens[:, None], single)[:, -1].float()
        error = (got - wanted).norm() / wanted.norm()
        assert error < tolerance, (i, float(error))
    loop.close()
    a, b = (cache.compressed_layers[-1].store for cache in (single, fixed))
    assert a.raw.lengths == b.raw.lengths
    assert a.table.rows == b.table.rows
    assert fixed.get_seq_length() == single.get_seq_length() == 1800


@pytest.mark.parametrize("compile", [False, True])
def test_generate_equals_generate_of_the_model(compile):
    model, ids = model_on_gpu(dtype=torch.float32), prompt(700, batch=2).cuda()
    options = {"budget": 1.0}
    wanted = generate(model, ids, selfindex.SelfIndexCache(model, **options), max_new_tokens=150)
    options |= {"eos_token_id": VOCAB, "pad_token_id": 0, "compile": compile}
    got = selfindex.generate(model, ids, max_new_tokens=150, **options)
    assert torch.equal(got, wanted)


def test_memory_does_not_grow_over_many_steps():
    model, ids = model_on_gpu(), prompt(400).cuda()
    cache = selfindex.SelfIndexCache(model, budget=64, dense_below=0)
    forward(model, ids, cache)
    loop = DecodeLoop(model, cache, 20_000)
    token, seen = ids[:, 0], []
    for i in range(20_000):
        loop.step(token)
        if i in (1000, 19_990):
            gc.collect()
            torch.cuda.synchronize()
            seen.append(torch.cuda.memory_allocated())
    assert torch.isfinite(loop.logits).all()
    assert seen[1] <= seen[0] + (1 << 20)


def test_a_graph_among_the_garbage_does_not_end_a_capture(monkeypatch):
    model, ids = model_on_gpu(), prompt(400).cuda()
    options = {"max_new_tokens": 4, "eos_token_id": VOCAB, "pad_token_id": 0}
    wanted = selfindex.generate(model, ids, **options)
    cache = selfindex.SelfIndexCache(model)
    forward(model, ids, cache)
    loop = DecodeLoop(model, cache, 4)
    loop.step(ids[:, -1])
    graphs, run = [loop._graph], DecodeLoop._forward
    loop._graph = None

    def littering(self):
        if graphs and torch.cuda.is_current_stream_capturing():
            cycle = [graphs.pop()]
            cycle.append(cycle)
            del cycle
            _ = [[] for _ in range(10_000)]  # enough for the collector to look
        run(self)

    monkeypatch.setattr(DecodeLoop, "_forward", littering)
    assert torch.equal(selfindex.generate(model, ids, **options), wanted)
    assert not graphs


def test_memory_does_not_grow_from_loop_to_loop():
    model, ids = model_on_gpu(), prompt(400).cuda()
    seen = []
    for _ in range(6):
        selfindex.generate(model, ids, max_new_tokens=4, eos_token_id=VOCAB, pad_token_id=0)
        gc.collect()
        torch.cuda.synchronize()
        seen.append(torch.cuda.memory_allocated())
    assert seen[-1] <= seen[1] + (1 << 20)


def test_loops_side_by_side_have_streams_of_their_own():
    model, ids = model_on_gpu(), prompt(400).cuda()
    loops = []
    for _ in range(3):
        cache = selfindex.SelfIndexCache(model)
        forward(model, ids, cache)
        loops.append(DecodeLoop(model, cache, 4))
        loops[-1].step(ids[:, -1])
    streams = [loop._stream for loop in loops]
    assert len(set(map(id, streams))) == 3
    for loop in loops:
        loop.close()
    cache = selfindex.SelfIndexCache(model)
    forward(model, ids, cache)
    again = DecodeLoop(model, cache, 4)
    again.step(ids[:, -1])
    assert again._stream is streams[-1]
