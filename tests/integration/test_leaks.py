"""The same work again and again leaves nothing behind; scripts/leaks.py publishes the numbers."""

import pytest
import torch
from uses import NAMES, Uses, growth

REPEAT = 20, 40, 80


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def uses(request):
    return Uses(request.param, torch.float32 if request.param == "cpu" else torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left(name, uses, monkeypatch):
    monkeypatch.delenv("SELFINDEX_CPU")  # compiled operators, where there are any
    # A leak is there in every repetition; what fills a cache of a library, or comes and goes as a block
    # of the C library's, is less of each the more there are.
    for repeat in REPEAT:
        found = growth(getattr(uses, name), repeat, device=uses.device)
        if found.get("malloc", 0) < 1024 and found.get("cuda", 0) < 512 and found["objects"] < 0.5:
            return
    pytest.fail(f"every repetition leaves {found}")
