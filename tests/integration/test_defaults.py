"""PyTorch's own defaults, which a program may set to anything."""

import pytest
import torch
from decoded_cache import full_cache, small_cache
from tiny_models import forward, make_model, prompt

from selfindex.backends.cpu import encode, tensors
from selfindex.codec import rotation


@pytest.fixture
def odd_defaults():
    """New tensors hold no data and are float64, unless their maker says otherwise."""
    for known in (rotation.rotation, tensors._rotations, encode._rotation_parts):
        known.cache_clear()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def conversation(model, new_cache, fed, **options):
    """Logits after pages, chunks, padding, steps, a crop, a fork and other rows."""
    cache, found = new_cache(model, **options), []
    mask = torch.ones(2, sum(ids.shape[1] for ids in fed), dtype=torch.long, device="cpu")
    mask[1, :7] = 0
    for ids in fed:
        found.append(forward(model, ids, cache, mask[:, : cache.get_seq_length() + ids.shape[1]]))
    cache.crop(-3)
    cache.batch_select_indices([1])
    cache.batch_repeat_interleave(2)
    fork = cache.fork()
    found.append(forward(model, fed[-1], fork, mask[[1, 1], : fork.get_seq_length() + 1]))
    fork.report()
    return found


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"page_size": 128},
        {"preset": "paper", "sinks": 4, "recent": 0},
        {"offloading": True},
        {"budget": 6},
    ],
)
def test_whatever_the_default_device_and_dtype_are(request, monkeypatch, compiled, options):
    monkeypatch.setenv("SELFINDEX_CPU", "" if compiled else "reference")
    model = make_model("mistral")  # head_dim 80: all constructions of a Hadamard matrix
    fed = [prompt(60, 2), prompt(30, 2, seed=1), *(prompt(1, 2, seed=i) for i in range(2, 12))]
    new_cache = small_cache if "budget" in options else full_cache
    wanted = conversation(model, new_cache, fed, **options)
    request.getfixturevalue("odd_defaults")
    found = conversation(model, new_cache, fed, **options)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
