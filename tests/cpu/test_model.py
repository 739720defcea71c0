"""A model over the compiled operators."""

import pytest
import torch
from tiny_models import forward, prompt

from selfindex import SelfIndexCache
from selfindex.cli import selfcheck


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_logits_are_close_to_the_references(isa, llama, monkeypatch, preset):
    ours = llama[1]
    ids, results = prompt(300), {}
    for name in ("reference", isa):
        monkeypatch.setenv("SELFINDEX_CPU", name)
        cache = SelfIndexCache(
            ours, preset=preset, budget=0.5, page_size=32, sinks=4, recent=16, min_tokens=8, dense_below=64
        )
        forward(ours, ids, cache)
        results[name] = torch.cat([forward(ours, step[None, None], cache) for step in prompt(40)[0]], 1)
    error = (results[isa] - results["reference"]).norm() / results["reference"].norm()
    assert error < 0.05


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_the_self_check_of_doctor_has_room_for_rounding(isa, preset):
    for dim in (64, 256):
        found = selfcheck.check(preset, dim, torch.device("cpu"))
        assert found.failures == []
        assert found.difference < selfcheck.TOLERANCE / 5
