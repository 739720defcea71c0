"""Tests inside vLLM; without it, or with a version that is not served, they are skipped."""

import importlib.util
import os

import pytest
import serving.engines  # noqa: F401 - how vLLM runs here, before it is imported

from selfindex.integrations.vllm.plugin import state


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    loads, why = state()
    if not loads or importlib.util.find_spec("vllm") is None:
        for item in items:
            if str(item.path).startswith(here) and item.get_closest_marker("no_engine") is None:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory, monkeypatch):
    """Balances that were measured go to a folder of the test session."""
    monkeypatch.setenv("SELFINDEX_CACHE", str(tmp_path_factory.getbasetemp() / "selfindex"))
