"""Steps of fixed shape in models with sliding-window layers, whose window is a ring then.

The ordinary step is transformers' own layer; the window of these models is 16 tokens, the ring has
room for more.
"""

import copy
import inspect
import warnings

import families
import pytest
import torch
from decoded_cache import decoded_cache, full_cache
from steps import LEFT, grow, positions
from stores import decoded_pages
from tiny_models import HYBRIDS, forward, generate, make_model, pair, prompt
from transformers.cache_utils import DynamicSlidingWindowLayer

from selfindex import InputError, StateError
from selfindex.integrations.transformers import replay
from selfindex.integrations.transformers.attention import attention_forward
from selfindex.integrations.transformers.new_keys import NewKeys
from selfindex.integrations.transformers.window import SlidingWindowLayer, ring_mask, slots_of

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
WINDOWS = (*HYBRIDS, "cohere2")


@pytest.fixture(autouse=True)
def _nothing_is_announced(monkeypatch):
    monkeypatch.setattr(replay, "announce", replay.announce.__wrapped__)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="selfindex runs decode steps")
        yield


class Both:
    """A cache that takes ordinary steps and one that takes steps of fixed shape."""

    def __init__(self, model):
        self.model, self.caches = model, [full_cache(model), full_cache(model)]
        self.caches[1].replay.emulate = True

    def __call__(self, ids, mask=None):
        options = {} if mask is None else {"mask": mask, "position_ids": positions(mask, ids.shape[1])}
        wanted, got = (forward(self.model, ids, cache, **options) for cache in self.caches)
        torch.testing.assert_close(got, wanted, **TOLERANCE)
        self.level()

    def level(self):
        """Gives both caches the same codes: where rounding decides one, all that follows would differ."""
        flips = 0
        for layers in zip(*(cache.compressed_layers for cache in self.caches), strict=True):
            wanted, got = (layer.store for layer in layers)
            for row in range(wanted.batch):
                held = [store.table.rows[row] for store in (wanted, got)]
                assert held[0].counts == held[1].counts
                for x, y in zip(decoded_pages(wanted, row), decoded_pages(got, row), strict=True):
                    # A code is a step of one channel, a scale or a page's mean a small one of many.
                    error = (y - x).norm(dim=-1) / x.norm(dim=-1)
                    assert (error < 0.25).all()
                    flips += sum(
                        (page > 1e-3).any(-1).sum().item() for page in error.split(held[0].counts, 1)
                    )
                for name in ("index", "payload"):
                    to, source = (getattr(store.pool, name) for store in (wanted, got))
                    to[held[0].blocks] = source[held[1].blocks]
        assert flips <= 2  # pages of a head

    def each(self, change):
        for cache in self.caches:
            change(cache)

    def fork(self, how):
        other = copy.copy(self)
        other.caches = [how(cache) for cache in self.caches]
        other.caches[1].replay.emulate = True
        return other

    def check_windows(self):
        windows = [
            [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
            for cache in self.caches
        ]
        assert windows[0]
        for wanted, got in zip(*windows, strict=True):
            assert type(got) is SlidingWindowLayer
            assert got.get_seq_length() == wanted.get_seq_length() == self.caches[1].get_seq_length()
            torch.testing.assert_close(got.keys, wanted.keys, **TOLERANCE)
            torch.testing.assert_close(got.values, wanted.values, **TOLERANCE)

    @property
    def steps(self):
        assert self.caches[0].replay.steps == 0
        return self.caches[1].replay.steps


@pytest.mark.parametrize("family", WINDOWS)
@pytest.mark.parametrize("length", [3, 40])
def test_steps_past_several_windows(family, length):
    dense, ours = families.any_pair(family)
    both = Both(ours)
    both(prompt(length, 2))
    for token in prompt(70, 2, seed=2).split(1, 1):
        both(token)
    assert both.steps == 70
    wanted = forward(dense, prompt(1, 2), decoded_cache(both.caches[1], dense))
    torch.testing.assert_close(forward(ours, prompt(1, 2), both.caches[1]), wanted, **TOLERANCE)
    assert both.steps == 71


@pytest.mark.parametrize("family", WINDOWS)
@pytest.mark.parametrize("padded", [False, True])
def test_other_passes_and_changes_between(family, padded):
    _, ours = families.any_pair(family)
    both, mask = Both(ours), LEFT if padded else None

    def run(both, *numbers):
        nonlocal mask
        for new in numbers:
            mask = None if mask is None else grow(mask, new)
            both(prompt(new, both.caches[0]._batch(), seed=new + 1), mask)

    both(prompt(40, 2), mask)
    run(both, 1, 3, 8, 1, 9, 1, 20, 8, 8, 8, 1)
    assert both.steps == 9
    for rows in ([1, 0], [0, 0]):
        both.each(lambda cache, rows=rows: cache.reorder_cache(torch.tensor(rows)))
        mask = None if mask is None else mask[rows]
        run(both, 1, 2)
    both.check_windows()
    held = mask
    for how in (lambda cache: cache.fork(), copy.deepcopy):
        other = both.fork(how)
        run(other, 1, 8, 1)
        other.check_windows()
        assert other.steps == 3
        mask = held
    run(both, 1)
    both.each(lambda cache: cache.batch_repeat_interleave(2))
    mask = None if mask is None else mask.repeat_interleave(2, 0)
    run(both, 1, 3)
    both.each(lambda cache: cache.batch_select_indices(torch.tensor([3, 1, 0])))
    mask = None if mask is None else mask[[3, 1, 0]]
    run(both, 3, 1)
    both.check_windows()
    assert both.steps == 18
    both.each(lambda cache: cache.reset())
    both(prompt(9))
    both(prompt(1))
    assert both.steps == 19


@pytest.mark.parametrize("family", WINDOWS)
def test_crop(family):
    _, ours = families.any_pair(family)
    both = Both(ours)
    both(prompt(9, 2))
    both(prompt(3, 2))
    both.each(lambda cache: cache.crop(-2))
    for new in (1, 3, 8, 8):
        both(prompt(new, 2, seed=new))
    for cache in both.caches:
        with pytest.raises(StateError, match="activate_past_recording"):
            cache.crop(-1)
    both.each(lambda cache: cache.activate_past_recording())
    for new, remove in ((5, 2), (8, 8), (8, 7), (1, 0), (8, 1)):
        both(prompt(new, 2, seed=new))
        both.each(lambda cache, remove=remove: cache.crop(-remove))
    both.check_windows()
    assert both.steps >= 9  # the balance may end within a step, which is an ordinary one then


@pytest.mark.skipif(
    "num_visible" not in inspect.getsource(DynamicSlidingWindowLayer.update),
    reason="this transformers takes no second pass of drafts",
)
def test_drafts_of_several_passes_are_all_kept():
    _, ours = pair("gemma3")
    both = Both(ours)
    both(prompt(30, 2))
    both.each(lambda cache: cache.activate_past_recording())
    for new in (8, 8, 8, 8, 8):
        both(prompt(new, 2))
    assert both.steps == 2  # more than a ring takes
    both.each(lambda cache: cache.crop(-38))
    both(prompt(1, 2))
    both.check_windows()
    assert both.steps == 3


def test_tokens_that_a_mask_hides_later_are_not_seen():
    # Filler behind the end of a row becomes padding: the window layers hold on to it.
    _, ours = pair("gemma3")
    both = Both(ours)
    both(prompt(20, 2))
    mask = torch.ones(2, 20, dtype=torch.long)
    for new in (1, 3):
        mask = grow(mask, new)
        both(prompt(new, 2, seed=new), mask)
    mask[1, -3:] = 0
    for new in (2, 1, 8, 8, 1):
        mask = grow(mask, new)
        both(prompt(new, 2, seed=new), mask)
    assert both.steps >= 6


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 12, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4},
        {"eos_token_id": list(range(2, 6))},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_generation(family, options):
    _, ours = pair(family)
    drafts = "prompt_lookup_num_tokens" in options
    ids, mask = (prompt(20).repeat(1, 2), torch.ones_like(LEFT[:1])) if drafts else (prompt(40, 2), LEFT)
    both, found = Both(ours), []
    for cache in both.caches:
        torch.manual_seed(5)
        found.append(generate(ours, ids, cache, attention_mask=mask, max_new_tokens=40, **options))
    assert torch.equal(*found)
    assert both.steps > 10


def test_the_model_that_attends_by_eager_attention():
    ours = make_model("gemma3", attention="eager")
    both = Both(ours)
    for new in (12, 1, 8, 8, 1):
        both(prompt(new, 2, seed=new))
    assert both.steps == 4


def test_a_report_counts_the_ring():
    _, ours = pair("gemma3")
    cache = full_cache(ours)
    cache.replay.emulate = True
    forward(ours, prompt(40), cache)
    forward(ours, prompt(1), cache)
    [window] = cache._windows()
    assert cache.report().other_bytes == 2 * window._ring[0].nbytes + 8
    cache.reset()
    assert cache.report().other_bytes == 8


def test_other_masks_than_sliding_windows_run_step_by_step():
    _, ours = families.pair("llama4_text")  # attends within chunks
    both = Both(ours)
    both(prompt(40))
    with pytest.warns(RuntimeWarning, match="masks of another kind than a sliding window of 16 tokens"):
        both(prompt(1))
    for token in prompt(20).split(1, 1):
        both(token)
    both.check_windows()
    assert both.steps == 0


@pytest.mark.parametrize("first", [0, 5, 14, 15, 16, 31, 100])
@pytest.mark.parametrize("new", [1, 8])
def test_what_a_new_token_sees(first, new):
    window = 16
    slots = slots_of(window)
    hidden = torch.full((2, slots), -1, dtype=torch.int32)
    if first > 4:
        hidden[1, (first - 4) % slots] = first - 4
    places, mask = ring_mask(torch.tensor(first), new, window, hidden, torch.float32)
    held = dict.fromkeys(range(slots))
    for position in range(first + new):
        held[position % slots] = position
    assert places.tolist() == [position % slots for position in range(first, first + new)]
    for row in range(2):
        for t, position in enumerate(range(first, first + new)):
            seen = sorted(held[slot] for slot in (mask[row, 0, t] == 0).nonzero().flatten().tolist())
            wanted = [
                c for c in range(max(0, position - window + 1), position + 1) if row == 0 or c != first - 4
            ]
            if first <= 4:
                wanted = list(range(max(0, position - window + 1), position + 1))
            assert seen == wanted


def test_attention_that_takes_no_masks_is_refused():
    _, ours = pair("gemma3")
    cache = full_cache(ours)
    keys = NewKeys(cache.layers[0], *torch.zeros(2, 1, 1, 1, 8))
    with pytest.raises(InputError, match="flash_attention_2 takes no masks"):
        attention_forward("flash_attention_2", None, torch.zeros(1, 2, 1, 8), keys, None, None)


def test_compiled_steps_are_refused():
    _, ours = pair("gemma3")
    cache, wanted = full_cache(ours, compile=True), full_cache(ours)
    for one in (cache, wanted):
        forward(ours, prompt(40), one)
    with pytest.warns(RuntimeWarning, match="does not know sliding-window layers"):
        got = forward(ours, prompt(1), cache)
    assert torch.equal(got, forward(ours, prompt(1), wanted))
    assert cache.replay.steps == 0
