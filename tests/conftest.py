"""Settings and fixtures shared by all tests."""

import backends
import pytest
import torch
from decoded_cache import check_tokens, full_cache
from hypothesis import HealthCheck, settings
from tiny_models import forward, pair, prompt

# Two pytest workers share two cores; more threads in each only make them wait for each other.
torch.set_num_threads(1)

settings.register_profile(
    "quick", max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("quick")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def backend(request, monkeypatch):
    """The specification serves all tests but those that ask for more, see backends.py, and tests/cpu."""
    with backends.use(getattr(request, "param", "reference"), monkeypatch) as used:
        yield used


@pytest.fixture
def llama():
    """(untouched model, equal model prepared for the cache)."""
    return pair("llama")


@pytest.fixture
def used(llama):
    """(untouched model, prepared model, its cache after 60 tokens)."""
    cache = full_cache(llama[1])
    forward(llama[1], prompt(60), cache)
    return *llama, cache


@pytest.fixture
def refuses(used):
    """Checks that a call on `used` fails as it should, and that the cache has lost nothing."""
    dense, ours, cache = used

    def check(call, error, match):
        with pytest.raises(error, match=match):
            call()
        cache.crop(60)
        check_tokens(cache, dense, prompt(60)[0])
        step = prompt(1)
        forward(ours, step, cache)
        check_tokens(cache, dense, torch.cat((prompt(60), step), 1)[0])

    return check
