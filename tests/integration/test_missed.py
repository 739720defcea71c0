"""What the report says about missed attention, against the softmax over the model's own keys."""

import copy
import json
from dataclasses import replace
from functools import partial

import backends
import pytest
import torch
from backends import scaled
from decoded_cache import full_cache, small_cache
from tiny_models import forward, make_model, pair, prompt
from torch._dynamo.backends.debugging import aot_eager

from selfindex import SelfIndexCache
from selfindex.attention.missed import missed_mass
from selfindex.errors import InputError
from selfindex.evaluation.layers import visible

BUDGET = 12


def recorded(model, cache, lengths, seed=0):
    """Run passes of so many random tokens; by layer, all observations."""
    found = {layer.layer_idx: [] for layer in cache.compressed_layers}
    for layer in cache.compressed_layers:
        layer.observer = lambda seen: found[seen.layer.layer_idx].append(seen)
    for i, new in enumerate(lengths):
        forward(model, prompt(new, seed=seed + i), cache)
    for layer in cache.compressed_layers:
        layer.observer = None
    return found


def true_mass(layer, seen, before, sink_logit=None):
    """Missed mass [Hq] of the last query of a step, from the keys that the model computed.

    Args:
        layer: of a cache as it was before the step; seen: all its observations, the step's as the last one.
        before: the full-precision keys [1, H, n, d] and queries of the prompt.
    """
    step = seen[-1]
    read = visible(layer, (before[0], before[1], None, step.scaling), step.query)  # [H, T, n]
    keys = torch.cat((before[1], step.keys), 2)[0].float()
    query = step.query[0, :, -1].float().unflatten(0, (len(keys), -1))  # [H, G, d]
    logits = query @ keys.mT * step.scaling
    if sink_logit is not None:
        logits = torch.cat((logits, sink_logit.float().view(len(keys), -1, 1)), -1)
    weights = logits.softmax(-1)[..., : read.shape[-1]]
    return (weights * ~read[:, -1:]).sum(-1).flatten().cpu()


def stepped(model, new=1, fixed=False, tokens=60, **options):
    """A cache after a prompt and a step, and the true mass that the step missed, [layers, Hq]."""
    cache = small_cache(model, **{"budget": scaled(BUDGET + 8) - 8} | options)
    seen = recorded(model, cache, [scaled(tokens)])
    other = copy.deepcopy(cache)
    held = {layer.layer_idx: copy.deepcopy(layer) for layer in cache.compressed_layers}
    steps = recorded(model, other, [new], seed=7)
    true = []
    for i, layer in held.items():
        sinks = getattr(model.model.layers[i].self_attn, "sinks", None)
        true.append(true_mass(layer, steps[i], (seen[i][0].query, seen[i][0].keys), sinks))
    cache.replay.emulate = fixed
    forward(model, prompt(new, seed=7), cache)
    if fixed:
        assert cache.replay.steps == 1
    return cache, torch.stack(true)


def estimated(cache):
    """What the report rests on, [layers, Hq]."""
    return torch.cat([missed_mass(layer.store, layer.last).cpu() for layer in cache.compressed_layers])


def error(found, true):
    return float(((found - true).norm() / true.norm()).detach())


TOLERANCE = 0.2
"""Relative error of the shares of all heads that decoded keys may cause."""


@backends.every
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"pinned_tokens": 5}], ids=str)
@pytest.mark.parametrize("fixed", [False, True])
def test_the_report_says_what_attention_was_missed(backend, options, new, fixed):
    _, ours = pair("llama")
    cache, true = stepped(ours, new, fixed, **options)
    found, report = estimated(cache), cache.report()
    assert 0.1 < true.mean() < 0.9
    assert error(found, true) < TOLERANCE
    # A selection that is disabled, or of another size, would show.
    half = copy.deepcopy(cache)
    for layer in half.compressed_layers:
        layer.last = replace(layer.last, read=[n // 2 for n in layer.last.read])
    assert error(estimated(half), true) > TOLERANCE
    for layer, own in zip(report.layers, found, strict=True):
        assert layer.missed == pytest.approx(float(own.mean()), abs=1e-5)
        assert layer.most_missed == pytest.approx(float(own.max()), abs=1e-5)
        assert layer.row_missed == [pytest.approx(layer.missed)]
    assert report.missed == pytest.approx(float(found.mean()), abs=1e-5)
    backend.check_ran("dense_attend", "window_attend")


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3", "qwen3_moe", "smollm3"])
def test_of_other_families(family):
    _, ours = pair(family)
    cache, true = stepped(ours, budget=6)
    assert error(estimated(cache), true) < TOLERANCE


def test_learned_sinks_take_their_share():
    ours = make_model("gpt_oss")
    with torch.no_grad():
        for layer in ours.model.layers:
            layer.self_attn.sinks.fill_(8.0)
    cache, true = stepped(ours, budget=6)
    assert error(estimated(cache), true) < TOLERANCE
    for layer in cache.compressed_layers:
        layer.last = replace(layer.last, asked=layer.last.asked._replace(sink_logit=None))
    assert error(estimated(cache), true) > 1


@pytest.mark.parametrize("fixed", [False, True])
def test_pages_encoded_since_were_read(llama, fixed):
    """The step fills a page: tokens that it read in full precision are encoded when the report asks."""
    cache, true = stepped(llama[1], fixed=fixed, tokens=67)
    layer = cache.compressed_layers[0]
    assert layer.store.encoded(0) == layer.last.encoded[0] + 8
    assert error(estimated(cache), true) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "order"),
    [
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda c: (c.reorder_cache(torch.tensor([1, 0])), c.batch_select_indices(torch.tensor([1]))), [0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.set_budget(1.0), [0, 1]),
        (lambda c: c.crop(0), [0, 1]),
    ],
)
@pytest.mark.parametrize("fixed", [False, True])
def test_it_follows_the_rows(llama, change, order, fixed):
    cache = small_cache(llama[1], budget=BUDGET)
    cache.replay.emulate = fixed
    forward(llama[1], prompt(60, 2), cache)
    forward(llama[1], prompt(1, 2), cache)
    before = cache.report().layers
    assert abs(before[1].row_missed[0] - before[1].row_missed[1]) > 0.01
    change(cache)
    for layer, old in zip(cache.report().layers, before, strict=True):
        assert layer.row_missed == [pytest.approx(old.row_missed[i], abs=1e-5) for i in order]


def test_rows_are_what_they_are_alone(llama):
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    ids, step = prompt(60, 2), prompt(1, 2)
    cache = small_cache(llama[1], budget=BUDGET)
    forward(llama[1], ids, cache, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    forward(llama[1], step, cache, mask, position_ids=(mask.cumsum(1) - 1)[:, -1:])
    for b, first in ((0, 0), (1, 20)):
        alone = small_cache(llama[1], budget=BUDGET)
        forward(llama[1], ids[b : b + 1, first:], alone)
        forward(llama[1], step[b : b + 1], alone)
        for own, found in zip(alone.report().layers, cache.report().layers, strict=True):
            assert found.row_missed[b] == pytest.approx(own.missed, rel=0.2)


def test_nothing_is_missed_where_everything_is_read(llama):
    cache = small_cache(llama[1], budget=BUDGET)
    forward(llama[1], prompt(15), cache)
    assert cache.report().missed == 0  # a prompt, and nothing encoded
    forward(llama[1], prompt(1), cache)
    assert cache.report().missed == 0
    forward(llama[1], prompt(40), cache)  # more than select for themselves
    assert cache.report().missed == 0
    for emulate in (False, True):
        cache = full_cache(llama[1])
        cache.replay.emulate = emulate
        forward(llama[1], prompt(60), cache)
        forward(llama[1], prompt(1), cache)
        report = cache.report()
        assert (report.missed, report.layers[0].most_missed, report.missed_unknown) == (0, 0, None)
        assert "attention mass of the last step: mean 0.0 %, worst layer 1: 0.0 %" in str(report)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-1),
        lambda cache: cache.crop(-55),
        lambda cache: setattr(cache.guard, "interrupted", True),
    ],
)
def test_a_query_that_fits_no_more_is_not_used(llama, change, fixed):
    cache = small_cache(llama[1], budget=BUDGET)
    cache.replay.emulate = fixed
    forward(llama[1], prompt(60), cache)
    forward(llama[1], prompt(1), cache)
    change(cache)
    report = cache.report()
    assert report.missed is None
    assert all(layer.missed is layer.most_missed is None for layer in report.layers)
    assert "no step has run" in report.missed_unknown or "cut short" in report.missed_unknown
    assert "attention mass of the last step" not in str(report)


def test_a_step_that_fails_leaves_no_old_query(llama):
    """A step of fixed shape writes its query where the last one put it, and only then is seen to fail."""
    cache = small_cache(llama[1], budget=BUDGET)
    cache.replay.emulate = True
    forward(llama[1], prompt(67), cache)
    with torch.no_grad():
        cache.compressed_layers[0].store.window.keys[:, :, 8] = torch.inf
    with pytest.raises(InputError):
        forward(llama[1], prompt(1), cache)
    assert cache.report().missed is None


def test_not_asked_for(llama):
    cache = small_cache(llama[1], budget=BUDGET)
    forward(llama[1], prompt(60), cache)
    forward(llama[1], prompt(1), cache)
    report = cache.report(missed=False)
    assert (report.missed, report.missed_unknown) == (None, "not asked for")
    assert "not asked for" in str(report)
    assert json.loads(json.dumps(cache.report().to_dict()))["missed"] > 0


def test_a_chunk_whose_last_tokens_are_padding(llama):
    cache = small_cache(llama[1], budget=BUDGET)
    forward(llama[1], prompt(60, 2), cache)
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, 62:] = 0
    forward(llama[1], prompt(4, 2), cache, mask)
    assert cache.report().missed is None
    assert "padding" in str(cache.report())


def test_a_loaded_cache_knows_nothing_before_its_first_step(llama, tmp_path):
    cache = small_cache(llama[1], budget=BUDGET)
    forward(llama[1], prompt(60), cache)
    forward(llama[1], prompt(1), cache)
    cache.save(llama[1], tmp_path / "cache")
    loaded = SelfIndexCache.load(llama[1], tmp_path / "cache")
    assert loaded.report().missed is None
    forward(llama[1], prompt(1), loaded)
    forward(llama[1], prompt(1), cache)
    assert loaded.report().missed == pytest.approx(cache.report().missed, abs=1e-5)


@backends.every
def test_offloading_and_forks(backend):
    _, ours = pair("llama")
    for offloading in (False, True):
        cache, true = stepped(ours, offloading=offloading)
        assert error(estimated(cache), true) < TOLERANCE
        before = estimated(cache)
        fork = cache.fork()
        cache.replay.emulate = True
        for i in range(3):
            forward(ours, prompt(1, seed=i), cache)
        torch.testing.assert_close(estimated(fork), before)
        assert error(estimated(cache), before) > 0.05  # other steps miss other shares
    backend.check_ran("dense_attend", "window_attend")


def test_a_step_in_a_compiled_model(llama, monkeypatch):
    """Memory of a compiled graph's tensors is used again."""
    wanted = None
    for options in ({}, {"compile": True}):
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=aot_eager))
        cache = small_cache(llama[1], budget=BUDGET, **options)
        forward(llama[1], prompt(60), cache)
        forward(llama[1], prompt(1), cache)
        found = estimated(cache)
        wanted = wanted if wanted is not None else found
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    compiled = torch.compile(llama[1])
    cache = small_cache(llama[1], budget=BUDGET)
    forward(llama[1], prompt(60), cache)
    with torch.no_grad():
        forward(compiled, prompt(1), cache)
    torch.testing.assert_close(estimated(cache), wanted, atol=1e-4, rtol=1e-3)
