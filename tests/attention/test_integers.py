"""Lengths and budgets are made into tensors once in a forward pass, and are those of that pass."""

import pytest
import torch
from decoded_cache import small_cache
from tiny_models import forward, pair, prompt

from selfindex.attention import attend as module
from selfindex.attention.integers import StepIntegers
from selfindex.backends import ops


def test_equal_lists_are_one_tensor_until_the_next_pass():
    integers, device = StepIntegers(), torch.device("cpu")
    with torch.inference_mode():
        one = integers([3, 5], device)
    assert one.dtype == torch.int32
    assert one.tolist() == [3, 5]
    assert not one.is_inference()
    assert integers([3, 5], device) is one
    assert integers([5, 3], device).tolist() == [5, 3]
    integers.begin()
    assert integers([3, 5], device) is not one


@pytest.mark.parametrize("rows", [1, 2])
def test_layers_share_them(rows, monkeypatch):
    _, ours = pair("llama")
    cache = small_cache(ours, budget=9)
    ids = prompt(40, rows)
    mask = torch.ones_like(ids)
    mask[1:, :7] = 0
    forward(ours, ids, cache, mask)
    seen, window_attend = [], ops.window_attend

    def recorded(*arguments):
        seen.append(arguments[5])
        return window_attend(*arguments)

    monkeypatch.setattr(module.ops, "window_attend", recorded)
    for _ in range(20):
        held = cache.compressed_layers[0].store.raw.lengths
        mask = torch.cat((mask, torch.ones(rows, 1, dtype=torch.long)), 1)
        positions = mask.cumsum(1)[:, -1:] - 1
        forward(ours, prompt(1, rows), cache, mask, position_ids=positions)
        first, second = seen[-2:]
        assert first is second
        assert first.tolist() == held
    assert len(seen) == 40
    assert len(cache.integers._known) == 2  # budgets and lengths of the last step
